"""The threads that compute: they take jobs from a bounded queue and do them, batch by batch. Knows no HTTP."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from lora_cli.serving.jobs import Busy, Job, Stopping, Work
from lora_cli.serving.labelling import Labelling
from lora_cli.serving.pool import Pool
from lora_cli.serving.writing import Writing

__all__ = ["Scheduler", "work_of"]

T = TypeVar("T")


def work_of(pool: Pool, batch_tokens: int) -> Work:
    """What is done with jobs for the adapters of `pool`."""
    return Writing(pool, batch_tokens) if pool.writes else Labelling(pool, batch_tokens)


def _answer(future: Future[T], function: Callable[[], T]) -> None:
    # Who has given up meanwhile is told nothing: that would be an error here.
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)


class Scheduler:
    """Does jobs for the adapters of `pool`, which it alone may use. At most `max_queue` rows wait."""

    def __init__(self, pool: Pool, *, batch_tokens: int, max_queue: int) -> None:
        self.pool, self._max_queue = pool, max_queue
        self.num_steps = 0
        pool.open_lanes()
        self._work = work_of(pool, batch_tokens)
        self._waiting: deque[Job] = deque()
        self._taken: deque[Job] = deque()
        """Those of which a thread decides what it begins."""
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._changed = threading.Condition()
        self._num_computing = 0
        self._is_stopping = self._is_over = False
        self.failure: str | None = None
        """Why nothing can be computed any more; None: it can."""
        self._threads = [
            threading.Thread(target=self._run, name=f"lora-serve-{number}", daemon=True)
            for number in range(pool.num_lanes)
        ]

    @property
    def num_waiting(self) -> int:
        """Rows that wait."""
        with self._changed:
            # A copy: who decides holds no lock that keeps others waiting.
            return sum(job.size for job in (*self._waiting, *self._taken))

    @property
    def num_tokens(self) -> int:
        """Tokens of what is being done."""
        return self._work.num_tokens

    @property
    def is_alive(self) -> bool:
        """Whether jobs are taken and done."""
        return all(thread.is_alive() for thread in self._threads) and not self._is_stopping

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn.

        Raises:
            Busy: too many rows are waiting.
            Stopping: no more jobs are taken.
        """
        with self._changed:
            if self._is_stopping:
                raise Stopping("the server is stopping")
            waiting = self.num_waiting
            if waiting and waiting + job.size > self._max_queue:
                raise Busy(f"{waiting} texts are waiting already; try again later")
            self._waiting.append(job)
            self._changed.notify()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Call a function in a thread that computes, while no other one takes jobs."""
        future: Future[T] = Future()
        with self._changed:
            if self._is_stopping:
                raise Stopping("the server is stopping")
            self._calls.append((future, function))
            self._changed.notify()
        return future

    def stop(self, grace_s: float) -> None:
        """Take no more jobs, and break off those that are not done within `grace_s` seconds."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        end = time.monotonic() + grace_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._end(Stopping("the server is stopping"))
        for thread in self._threads:
            thread.join(grace_s)

    def _end(self, reason: Stopping) -> None:
        """Tell who waits that nothing comes any more; the threads end after their step."""
        with self._changed:
            self._is_stopping = self._is_over = True
            for job in self._waiting:
                job.tell(reason)
            self._waiting.clear()
            for future, _ in self._calls:
                if future.set_running_or_notify_cancel():
                    future.set_exception(reason)
            self._calls.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        reason = Stopping("the server is stopping")
        try:
            self._take_turns()
        except BaseException as error:
            # Nobody else answers what has been begun here: who waits is told, and who asks from now on.
            reason = Stopping("the server can compute nothing any more")
            self._end(reason)
            self.failure = f"{type(error).__name__}: {error}"
        if self._is_over:
            # What was taken out while this was decided has been put back.
            self._end(reason)
            with contextlib.suppress(Exception):
                self._work.end(reason)

    def _take_turns(self) -> None:
        """Take jobs and do them, in turn with the other threads, until there are to be no more."""
        while self._has_more():
            with self.pool.lock:
                with self._changed:
                    # Taken out, so that nobody waits for this lock while texts are tokenised.
                    calls, self._calls = self._calls, deque()
                    waiting, self._waiting = self._waiting, deque()
                    self._taken = waiting
                for future, function in calls:
                    _answer(future, function)
                self._work.begin(waiting)
                with self._changed:
                    self._waiting.extendleft(reversed(waiting))
                    self._taken = deque()
                    is_idle = self._work.is_idle
                    self._num_computing += not is_idle
                    self._changed.notify()
            if is_idle:
                self._wait_for_room()
                continue
            was_done = self._work.step()
            with self._changed:
                self._num_computing -= 1
                self.num_steps += was_done
                self._changed.notify_all()

    def _has_more(self) -> bool:
        """Wait for something to do; False: there is and will be nothing."""
        with self._changed:
            while not (self._waiting or self._calls or self._is_stopping or not self._work.is_idle):
                self._changed.wait()
            is_done = self._is_stopping and not self._waiting and not self._calls and self._work.is_idle
            return not (self._is_over or is_done)

    def _wait_for_room(self) -> None:
        """If what waits could not be begun, wait for another thread to release what it needs."""
        with self._changed:
            if self._waiting and self._num_computing and not self._is_over:
                self._changed.wait()
