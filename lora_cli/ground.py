"""What a training, or several, stand on: a frozen base model and data as it takes it, on a device.

Knows the task, the model and the engine; not what adapts the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lora_cli.checkpointing import checkpoint_layers, layers_of
from lora_cli.engine.device import Device, open_device
from lora_cli.engine.evaluate import forward, predict
from lora_cli.engine.offload import Streamed, move_whole
from lora_cli.engine.selfcheck import check_same_logits
from lora_cli.errors import ConfigError
from lora_cli.late_logits import can_wait, make_logits_late
from lora_cli.models import BaseModel, load_base
from lora_cli.nn import INITS
from lora_cli.prepacked import prepack
from lora_cli.spec import LoraSpec, TrainRun
from lora_cli.tasks import Encoded, Rows, Task, TextTask
from lora_cli.unpadded import remove_padding

__all__ = ["FEW", "Ground", "logits_of_few", "run_on"]

FEW = 8
"""Examples on which self-checks compare logits."""
_FEW_TOKENS = 1024
"""Tokens that these have at most, unless one alone has more."""


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What several trainings can stand on: a base model that none of them changes, and data as it takes it."""

    task: Task
    rows: Mapping[str, Rows]
    data: Mapping[str, Encoded]
    base: BaseModel
    device: Device
    is_packed: bool
    """Whether the model runs without padding."""
    logits: torch.Tensor
    """Of a few examples, without any adapter."""
    settle: Callable[[], object]
    """Moves the model, or what was put into it, to where it computes."""

    @classmethod
    def lay(cls, spec: TrainRun, task: Task, rows: Mapping[str, Rows]) -> Ground:
        """Load the base model of `spec` and encode `rows`.

        Raises:
            UserError: the model or the data do not fit.
            TrainingFailure: without padding the model computes something else.
        """
        device = open_device(spec.device)
        base = load_base(
            spec.model,
            **task.head,
            seed=spec.seed_for("init"),
            dtype=device.dtype,
            device=device.device,
            keep_original=spec.lora.init == "loftq",
        )
        device.world.share_out(base.model, base.fresh, device.device, offload=spec.device.offload_base)
        settle = _at_home(spec, base, device)
        data = {split: task.encode(found, base) for split, found in rows.items()}
        is_packed = (
            spec.train.packing is not False
            and not device.compiles
            and _remove_padding(task, base, data["train"], device)
        )
        if spec.train.packing and not is_packed:
            raise ConfigError("train.packing", "true", f"not with {base.family}, whose attention needs padded texts")
        # Of weights that are split, the head's is whole only while the head itself is computed.
        is_plain = device.world.is_sharded or device.compiles
        _make_logits_late("off" if is_plain else spec.train.logits_chunk, task, base)
        # Layers whose weights come and go are computed again anyway.
        if spec.train.checkpointing and not _streams(spec):
            checkpoint_layers(base.model, base.family)
        # Before anything is copied from the model or compared with it.
        prepack(base.model, limit_mib=device.prepack_mib, skip=base.fresh, copies=False)
        logits = logits_of_few(task, base, data["train"], device)
        return cls(
            task=task, rows=rows, data=data, base=base, device=device, is_packed=is_packed, logits=logits, settle=settle
        )

    def check_unchanged(self, lora: LoraSpec, base: BaseModel) -> None:
        """See that the fresh adapter of `lora` in `base`, which is that of here or shares its weights, leaves the
        logits as they were.

        Raises:
            TrainingFailure: it does not.
        """
        # What starts at 0 adds exactly 0, and so does what is still at its start. DoRA divides by a norm and multiplies
        # by it, the identity only up to rounding; so is a product of fewer rows, the B A of an orthogonal init, and
        # weights in fp32 that were narrower.
        rounding = 1e-4 if self.device.is_exact else 2e-2
        is_wider = lora.variant == "full" and not self.device.is_exact
        is_rounded = lora.variant == "dora" or lora.init == "orthogonal" or base.new_rows or is_wider
        tolerance = rounding if is_rounded else 0.0
        # LoftQ changes it, towards the model that was quantised: layer by layer for certain, which tests hold it to.
        if INITS[lora.init].is_neutral:
            after = logits_of_few(self.task, base, self.data["train"], self.device)
            check_same_logits("a fresh adapter must not change the base model", self.logits, after, tolerance=tolerance)


def run_on(task: Task, base: BaseModel, examples: Sequence[Any], device: Device) -> None:
    """Let the model compute these examples, for what that leaves behind."""
    batch = device.move(task.collate(examples))
    with device.autocast():
        forward(base.model, batch)


def logits_of_few(task: Task, base: BaseModel, data: Encoded, device: Device) -> torch.Tensor:
    """Logits of a few short examples, without dropout."""
    shortest = sorted(data.examples, key=lambda example: example.num_tokens)[:FEW]
    # Of long texts fewer: a writing model has a logit for each word of its vocabulary and each token of theirs.
    while len(shortest) > 1 and len(shortest) * shortest[-1].num_tokens > _FEW_TOKENS:
        shortest.pop()
    return next(predict(base.model, task, shortest, device=device, batch_size=FEW))[1]


def _remove_padding(task: Task, base: BaseModel, data: Encoded, device: Device) -> bool:
    """Make the model compute no padding, if its family allows it.

    Raises:
        TrainingFailure: it computes something else then.
    """
    by_length = sorted(data.examples, key=lambda example: example.num_tokens)
    batch = device.move(task.collate([by_length[min(FEW, len(by_length) - 1)], *by_length[:2]]))

    def logits() -> torch.Tensor:
        with device.without_gradients(), device.autocast():
            return task.decisions(forward(base.model, batch), batch)

    padded = logits()
    if not remove_padding(base.model):
        return False
    promise = "texts laid end to end must give the logits of padded ones"
    check_same_logits(promise, padded, logits(), tolerance=1e-4 if device.is_exact else 2e-2)
    return True


def _streams(spec: TrainRun) -> bool:
    """Whether the weights of a layer are fetched by us for its turn; those that are split, by what split them."""
    return spec.device.offload_base and not spec.device.shard


def _at_home(spec: TrainRun, base: BaseModel, device: Device) -> Callable[[], object]:
    """Move the model to its device, with device.offload_base all but the weights of its layers; returns what moves it
    again after a change.
    """
    if _streams(spec):
        layers = layers_of(base.model, base.family, key="device.offload_base")
        return Streamed(base.model, layers, device.device).place
    place: Callable[[], object] = partial(base.model.to, device.device)
    if spec.device.offload_base:
        place = partial(move_whole, base.model, device.device)
    place()
    return place


def _make_logits_late(setting: str, task: Task, base: BaseModel) -> None:
    """Let the logits of large batches be computed part by part, if that is not switched off.

    Raises:
        ConfigError: a number is asked for, and there are no such logits, or the family makes them in its own way.
    """
    if isinstance(task, TextTask) and can_wait(base.model):
        if setting != "off":
            make_logits_late(base.model, setting)
    elif setting not in ("auto", "off"):
        why = (
            f"with {base.family}, whose logits are made in its own way"
            if isinstance(task, TextTask)
            else "where no words are learnt"
        )
        raise ConfigError("train.logits_chunk", setting, f"auto or off: not {why}")
