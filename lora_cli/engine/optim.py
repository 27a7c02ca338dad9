"""AdamW and the learning-rate schedule."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch

from lora_cli.engine.device import Device
from lora_cli.errors import ConfigError
from lora_cli.spec import TrainSpec

__all__ = ["build_optimizer", "check_optimizer", "rate", "set_rate", "warmup_steps"]


class _AdamW(torch.optim.AdamW):
    """torch's. There each of these is wrapped in what keeps a compiler out, and imports all of it at the first call."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)


def build_optimizer(groups: Iterable[dict[str, Any]], spec: TrainSpec) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) over parameter groups that bring their own lr and weight_decay.

    Paged, its states lie in memory that the GPU shares with the host (Dettmers et al. 2023, arXiv:2305.14314,
    section 3).

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    prepared = [{**group, "peak_lr": group["lr"]} for group in groups]
    settings: dict[str, Any] = {"lr": spec.lr, "betas": (spec.betas[0], spec.betas[1]), "eps": spec.eps}
    if spec.optimizer == "adamw":
        # On a CPU torch has it as one pass over memory only where it is asked for.
        is_on_cpu = all(p.device.type == "cpu" for group in prepared for p in group["params"])
        return _counting(_AdamW(prepared, **settings, fused=is_on_cpu or None))
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("train.optimizer", spec.optimizer, "needs a package: pip install 'lora-cli[quant]'")
    from bitsandbytes.optim import PagedAdamW32bit

    return _counting(PagedAdamW32bit(prepared, **settings))


def _counting(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let a step count as a change of what it writes to, which one pass over memory does not by itself: what is
    computed once for each state of a parameter goes by that count.
    """

    def count(*_: object) -> None:
        torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])

    optimizer.register_step_post_hook(count)
    return optimizer


def check_optimizer(name: str, device: Device) -> None:
    """Refuse an optimizer that has nothing to do on this device.

    Raises:
        ConfigError: paged states without a GPU.
    """
    if name == "paged_adamw" and not device.can_page:
        raise ConfigError("train.optimizer", name, f"needs an NVIDIA GPU, whose memory it spares; this is {device}")


def warmup_steps(total: int, spec: TrainSpec) -> int:
    """Steps of a training of `total` over which the learning rate rises."""
    return math.ceil(total * spec.warmup) if spec.warmup_steps is None else spec.warmup_steps


def rate(step: int, total: int, spec: TrainSpec) -> float:
    """Share of the peak learning rate at 0-based `step` of `total`.

    Rises over the warm-up without a wasted step at 0, then falls to 0 (linear, cosine) or stays (constant).
    """
    warmup = warmup_steps(total, spec)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if spec.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    return 1.0 - done if spec.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Scale every group's learning rate to `factor` of its peak; returns the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])
