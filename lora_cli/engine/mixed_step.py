"""The micro-steps of several trainings as one batch on a base model that they share.

Rows do not see each other, so one backward pass of the sum of all losses leaves in the parameters of each adapter the
gradients of its own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional

from lora_cli.dropout import Streams
from lora_cli.engine.evaluate import forward
from lora_cli.engine.micro_step import Answer, MicroStep
from lora_cli.nn import Bank
from lora_cli.unpadded import num_laid, takes_labels

__all__ = ["gradients", "num_learnt"]

_IGNORED = -100
"""Label of what is not learnt."""


def gradients(bank: Bank, wanted: Mapping[str, MicroStep]) -> dict[str, Answer]:
    """Compute what all adapters of `bank` that are named ask for; its base has to run without padding.

    Each draws the dropout that it would draw alone. Its losses are those of its own batch up to rounding.
    """
    started = time.perf_counter()
    # In the bank's order, by which it numbers them.
    names = [name for name in bank.names if name in wanted]
    steps = [wanted[name] for name in names]
    batches, device = [step.batch for step in steps], steps[0].device
    rows = [len(batch["attention_mask"]) for batch in batches]
    with device.autocast():
        tokens = [num_laid(bank.model, int(batch["attention_mask"].sum())) for batch in batches]
    kept = [num_learnt(batch["labels"]) for batch in batches] if takes_labels(bank.model) else rows
    states = []
    for step in steps:
        device.seed(*step.seed)
        states.append(device.generator.get_state())
    bank.model.train()
    members = [name for name, count in zip(names, rows, strict=True) for _ in range(count)]
    # The backward pass too: there layers may be computed again.
    with Streams(device.generator, states, (rows, tokens, kept)).shared(), bank.rows(members):
        with device.autocast(), device.saving():
            logits = forward(bank.model, _stacked(batches), blocks=rows)
            losses = [step.loss(own) for step, own in zip(steps, logits.split_with_sizes(kept), strict=True)]
        # Not the other way round: a mean over all would weigh one's rows by the number of others.
        torch.stack([step.scaled(loss) for step, loss in zip(steps, losses, strict=True)]).sum().backward()  # type: ignore[no-untyped-call]
    share = (time.perf_counter() - started) / len(steps)
    return {name: Answer(loss.detach(), share) for name, loss in zip(names, losses, strict=True)}


def _stacked(batches: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The rows of all, one batch after the other, as wide as the widest."""
    stacked = {}
    for name in batches[0]:
        values = [batch[name] for batch in batches]
        if values[0].ndim == 2:
            widest, filler = max(value.shape[1] for value in values), _IGNORED if name == "labels" else 0
            values = [functional.pad(value, (0, widest - value.shape[1]), value=filler) for value in values]
        stacked[name] = torch.cat(values)
    return stacked


def num_learnt(labels: torch.Tensor) -> int:
    """Tokens that a decoder computes logits for."""
    return int((labels[:, 1:] >= 0).sum())
