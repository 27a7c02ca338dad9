"""Scoring a split, and predicting: batches in, no gradient, no logits kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch

from lora_cli import machine
from lora_cli.compiled import compiled_form
from lora_cli.engine.batches import by_length
from lora_cli.engine.device import Device
from lora_cli.late_logits import takes_late
from lora_cli.unpadded import takes_labels

__all__ = ["Example", "Scorer", "Task", "evaluate", "forward", "predict", "rehearse"]


class Example(Protocol):
    """One encoded item of data."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the input, without padding."""


class Scorer(Protocol):
    """Collects predictions and the loss of a split; keeps no logits."""

    def add(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor], indices: Sequence[int]) -> None: ...

    @property
    def found(self) -> Any: ...

    def take(self, found: Any) -> None: ...

    def result(self) -> dict[str, float | None]: ...


_FEW = 8
"""The longest rows of a batch, from which what the whole batch takes is reckoned, at most."""
_PLENTY = 0.1
"""A share of the memory that is available, so small that the reckoning may be far off."""
S = TypeVar("S", bound=Scorer, covariant=True)


class Task(Protocol[S]):
    """What the engine needs to know of a task. `S` is its kind of scorer."""

    def collate(self, examples: Sequence[Any]) -> dict[str, torch.Tensor]: ...

    def num_targets(self, batch: Mapping[str, torch.Tensor]) -> int: ...

    def loss(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor: ...

    def scorer(self) -> S: ...


def forward(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], *, for_loss: bool = False, **how: Any
) -> torch.Tensor:
    """Logits of a batch; the loss is the task's. Labels go in only where they say which logits are wanted.

    If they are `for_loss` alone, many may be computed no sooner than it is: see `late_logits`. `how` are arguments of
    the model besides the batch.
    """
    if for_loss and takes_late(model):
        how["late"] = True
    inputs = {name: value for name, value in batch.items() if name != "labels" or takes_labels(model)}
    if (compiled := compiled_form(model)) and not how:
        return compiled(inputs)
    logits: torch.Tensor = model(**inputs, **how).logits
    return logits


def evaluate(
    model: torch.nn.Module, task: Task[S], examples: Sequence[Example], *, device: Device, batch_size: int
) -> S:
    """Score `examples`, longest first. The model is left in eval mode.

    Of several processes each does its part, and all end with the whole.
    """
    scorer, parts = task.scorer(), by_length([example.num_tokens for example in examples], batch_size)
    model.eval()
    for indices, counts in device.world.own(parts):
        logits, batch = _predicted(model, task, examples, indices, device, for_loss=True)
        if counts:
            with device.without_gradients():
                # Logits may be made no sooner than their loss is.
                scorer.add(logits, batch, indices)
    for rank, found in enumerate(device.world.gathered(scorer.found)):
        if rank != device.world.rank:
            scorer.take(found)
    return scorer


def predict(
    model: torch.nn.Module,
    task: Task[Scorer],
    examples: Sequence[Example],
    *,
    device: Device,
    batch_size: int,
    for_loss: bool = False,
) -> Iterator[tuple[list[int], torch.Tensor, dict[str, torch.Tensor]]]:
    """(example numbers, logits, batch) of each batch, longest first; `for_loss` is as for `forward`."""
    model.eval()
    for indices in by_length([example.num_tokens for example in examples], batch_size):
        yield indices, *_predicted(model, task, examples, indices, device, for_loss=for_loss)


def _predicted(
    model: torch.nn.Module,
    task: Task[Scorer],
    examples: Sequence[Example],
    indices: Sequence[int],
    device: Device,
    *,
    for_loss: bool,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of one batch, and the batch."""
    batch = device.move(task.collate([examples[number] for number in indices]))
    with device.without_gradients(), device.autocast():
        return forward(model, batch, for_loss=for_loss), batch


def rehearse(
    model: torch.nn.Module, task: Task[Scorer], examples: Sequence[Example], *, device: Device, batch_size: int
) -> None:
    """Score the longest batch and forget it: what is too large for memory fails now, not after an epoch.

    On a processor some of its rows come first, and are enough where they show that the memory is plentiful.
    """
    longest = [examples[number] for number in by_length([e.num_tokens for e in examples], batch_size)[0]]
    if device.device.type == "cpu" and device.world.size == 1:
        before, few = device.resident_memory(), longest[:_FEW]
        evaluate(model, task, few, device=device, batch_size=batch_size)
        taken = device.peak_memory_mib() * 2**20 - before
        if taken / len(few) * len(longest) < _PLENTY * machine.memory().available:
            return
    evaluate(model, task, longest, device=device, batch_size=batch_size)
