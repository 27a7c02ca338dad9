"""Which examples meet in a batch, and when. A pure function of (lengths, seed, epoch): resuming needs no state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["BatchPlan", "by_length"]


@dataclass(frozen=True)
class BatchPlan:
    """The batches of every epoch.

    Examples are shuffled over the whole data set; within `window` consecutive batches they are then sorted by
    length, so that a batch pads little, and all batches are shuffled again. window=1 is a plain random order.
    `accumulation` batches make one optimizer step; the last step of an epoch may hold fewer.
    """

    lengths: Sequence[int]
    batch_size: int
    accumulation: int
    window: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the examples."""
        return math.ceil(math.ceil(len(self.lengths) / self.batch_size) / self.accumulation)

    def batches(self, epoch: int) -> list[list[int]]:
        """Example numbers of each batch of one epoch; every example stands in exactly one."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.lengths))
        if self.window > 1:
            lengths = np.asarray(self.lengths)
            span = self.window * self.batch_size
            chunks = [order[start : start + span] for start in range(0, len(order), span)]
            order = np.concatenate([chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in chunks])
        batches = [order[start : start + self.batch_size].tolist() for start in range(0, len(order), self.batch_size)]
        if self.window > 1:
            batches = [batches[number] for number in random.permutation(len(batches))]
        return batches

    def steps(self, start: int, stop: int) -> Iterator[tuple[int, list[list[int]]]]:
        """(step number, its batches) for steps start..stop-1, counted over all epochs."""
        epoch, batches = -1, []
        for step in range(start, stop):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                batches = self.batches(epoch)
            first = step % self.steps_per_epoch * self.accumulation
            yield step, batches[first : first + self.accumulation]


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches for scoring: longest first, so that a batch too large for memory fails at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
