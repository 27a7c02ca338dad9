"""Texts classified, those of all adapters and all requests together: batches by a budget of tokens."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from lora_cli.errors import LoraError
from lora_cli.serving.jobs import Job, LabelJob
from lora_cli.serving.pool import Full, Labelled, Pool

__all__ = ["Labelling"]


@dataclass(frozen=True)
class _Item:
    job: LabelJob
    index: int
    row: Labelled


class Labelling:
    """See `jobs.Work`. A forward pass takes rows of `batch_tokens` tokens, or one row."""

    def __init__(self, pool: Pool, batch_tokens: int) -> None:
        self._pool, self._budget = pool, batch_tokens
        self._items: deque[_Item] = deque()
        self.num_tokens = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing is begun."""
        return not self._items

    def begin(self, waiting: deque[Job]) -> None:
        """Take jobs from the left until there is work for a forward pass of each thread.

        Those whose adapter has no room yet are passed over; the first of them is the first of the next batch.
        """
        passed: deque[Job] = deque()
        is_new = not self._items
        enough = self._budget * self._pool.num_lanes
        while waiting and self.num_tokens < enough and (is_new or not passed):
            job = waiting.popleft()
            assert isinstance(job, LabelJob)
            if job.is_over:
                job.give_up()
                continue
            try:
                self._begin(job)
            except Full as error:
                if self._items or self._pool.is_in_use:
                    passed.append(job)
                else:
                    job.tell(error)
            except Exception as error:
                job.tell(error)
        waiting.extendleft(reversed(passed))

    def step(self) -> bool:
        """One forward pass; if it fails, each row is tried alone, so that the one at fault fails alone."""
        chosen = self._taken()
        kept = [item for item in chosen if not item.job.is_over]
        for item in chosen:
            if item.job.is_over:
                self._fail(item, None)
        try:
            self._answer(kept)
        except Exception as error:
            for item in kept:
                try:
                    if len(kept) == 1:
                        raise error
                    self._answer([item])
                except Exception as reason:
                    self._fail(item, reason)
        with self._pool.lock:
            for item in chosen:
                self._pool.release(item.row.ready)
        return bool(chosen)

    def end(self, error: LoraError) -> None:
        """Break off what is begun."""
        with self._pool.lock:
            items, self._items, self.num_tokens = self._items, deque(), 0
            for item in items:
                self._fail(item, error)
            for item in items:
                self._pool.release(item.row.ready)

    def _taken(self) -> list[_Item]:
        """The rows of the next forward pass."""
        chosen: list[_Item] = []
        tokens = 0
        with self._pool.lock:
            while self._items and (not chosen or tokens + self._items[0].row.num_tokens <= self._budget):
                chosen.append(self._items.popleft())
                tokens += chosen[-1].row.num_tokens
            self.num_tokens -= tokens
        return chosen

    def _begin(self, job: LabelJob) -> None:
        ready = self._pool.ready(job.name)
        rows = self._pool.encode(ready, job.rows)
        for index, row in enumerate(rows):
            self._pool.hold(ready)
            self._items.append(_Item(job, index, row))
            self.num_tokens += row.num_tokens

    def _answer(self, items: list[_Item]) -> None:
        if not items:
            return
        for item, answer in zip(items, self._pool.classify([item.row for item in items]), strict=True):
            item.job.answers[item.index] = answer
            if len(item.job.answers) == len(item.job.rows):
                item.job.tell([item.job.answers[index] for index in range(len(item.job.rows))])

    def _fail(self, item: _Item, reason: Exception | None) -> None:
        """The job's end, told once; its other rows are not computed any more."""
        if not item.job.is_cancelled:
            item.job.is_cancelled = True
            if reason is None:
                item.job.give_up()
            else:
                item.job.tell(reason)
