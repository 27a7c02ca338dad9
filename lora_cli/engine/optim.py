"""AdamW and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from lora_cli.spec import TrainSpec

__all__ = ["build_optimizer", "rate", "set_rate"]


def build_optimizer(groups: Iterable[dict[str, Any]], spec: TrainSpec) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over parameter groups that bring their own lr and weight_decay."""
    prepared = [{**group, "peak_lr": group["lr"]} for group in groups]
    return torch.optim.AdamW(prepared, lr=spec.lr, betas=(spec.betas[0], spec.betas[1]), eps=spec.eps)


def rate(step: int, total: int, spec: TrainSpec) -> float:
    """Share of the peak learning rate at 0-based `step` of `total`.

    Rises over the warm-up without a wasted step at 0, then falls to 0 (linear, cosine) or stays (constant).
    """
    warmup = math.ceil(total * spec.warmup)
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
