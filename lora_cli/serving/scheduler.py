"""The thread that computes: takes jobs from a bounded queue and does them, batch by batch. Knows no HTTP."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from lora_cli.serving.jobs import Busy, Job, Stopping, Work
from lora_cli.serving.labelling import Labelling
from lora_cli.serving.pool import Pool
from lora_cli.serving.writing import Writing

__all__ = ["Scheduler", "work_of"]

T = TypeVar("T")


def work_of(pool: Pool, batch_tokens: int) -> Work:
    """What is done with jobs for the adapters of `pool`."""
    return Writing(pool, batch_tokens) if pool.writes else Labelling(pool, batch_tokens)


class Scheduler:
    """Does jobs for the adapters of `pool`, of which it alone may use the model. At most `max_queue` rows wait."""

    def __init__(self, pool: Pool, *, batch_tokens: int, max_queue: int) -> None:
        self.pool, self._max_queue = pool, max_queue
        self.num_steps = 0
        self._work = work_of(pool, batch_tokens)
        self._waiting: deque[Job] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="lora-serve", daemon=True)

    @property
    def num_waiting(self) -> int:
        """Rows that wait."""
        with self._changed:
            return sum(job.size for job in self._waiting)

    @property
    def num_tokens(self) -> int:
        """Tokens of what is being done."""
        return self._work.num_tokens

    @property
    def is_alive(self) -> bool:
        """Whether jobs are taken and done."""
        return self._thread.is_alive() and not self._is_stopping

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn.

        Raises:
            Busy: too many rows are waiting.
            Stopping: no more jobs are taken.
        """
        with self._changed:
            if self._is_stopping:
                raise Stopping("the server is stopping")
            waiting = sum(each.size for each in self._waiting)
            if waiting and waiting + job.size > self._max_queue:
                raise Busy(f"{waiting} texts are waiting already; try again later")
            self._waiting.append(job)
            self._changed.notify()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Call a function in the thread, between two batches."""
        future: Future[T] = Future()

        def do() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._changed:
            if self._is_stopping:
                raise Stopping("the server is stopping")
            self._calls.append(do)
            self._changed.notify()
        return future

    def stop(self, grace_s: float) -> None:
        """Take no more jobs, and break off those that are not done within `grace_s` seconds."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join(grace_s)
        if self._thread.is_alive():
            with self._changed:
                for job in self._waiting:
                    job.tell(Stopping("the server is stopping"))
                self._waiting.clear()
                self._calls.append(lambda: self._work.end(Stopping("the server is stopping")))
            self._thread.join(grace_s)

    def _run(self) -> None:
        try:
            self._take_turns()
        except BaseException as error:
            # Nobody else would answer any more: who waits is told, and who asks from now on.
            reason = Stopping("the server can compute nothing any more")
            with self._changed:
                self._is_stopping = True
                for job in self._waiting:
                    job.tell(reason)
                self._waiting.clear()
            self._work.end(reason)
            self.pool.warn(f"internal error, nothing is answered any more: {type(error).__name__}: {error}")

    def _take_turns(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._calls or self._is_stopping or not self._work.is_idle):
                    self._changed.wait()
                if self._is_stopping and not self._waiting and not self._calls and self._work.is_idle:
                    return
                calls, self._calls = self._calls, deque()
                # Taken out, so that nobody waits for the lock while texts are tokenised.
                waiting, self._waiting = self._waiting, deque()
            for call in calls:
                call()
            self._work.begin(waiting)
            with self._changed:
                self._waiting.extendleft(reversed(waiting))
            if not self._work.is_idle:
                self._work.step()
                self.num_steps += 1
