"""Threads that compute side by side, and what becomes of jobs when one of them cannot go on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_cli.serving.jobs import Busy, LabelJob, Stopping
from lora_cli.serving.pool import Labelled, Pool
from lora_cli.serving.scheduler import Scheduler
from serving.conftest import wait_until

NAMES = ("a", "b", "c", "dora", "two")
TEXTS = ("aa", "bb and aa", "zzzz", "a film of zzzz and of aa", "bb")


@pytest.fixture
def schedule(films: Path, pool_of: Callable[..., Pool]) -> Iterator[Callable[..., Scheduler]]:
    """schedule(threads=2, max_adapters=1): a scheduler that runs until the test ends."""
    running: list[Scheduler] = []

    def start(**settings: Any) -> Scheduler:
        pool = pool_of(films, **{"threads": 2, **settings})
        pool.warn = lambda text: None
        running.append(Scheduler(pool, batch_tokens=40, max_queue=1000))
        running[-1].start()
        return running[-1]

    yield start
    for each in running:
        each.stop(1.0)


def asked(number: int) -> tuple[list[LabelJob], list[list[Any]]]:
    """Jobs of one text each, and what each is told."""
    told: list[list[Any]] = [[] for _ in range(number)]
    return [
        LabelJob(name=NAMES[place % 5], rows=[{"text": TEXTS[place % 7 % 5]}], tell=each.append)
        for place, each in enumerate(told)
    ], told


def test_two_batches_are_computed_at_once_and_answered_as_single_texts(schedule: Callable[..., Scheduler]) -> None:
    scheduler = schedule()
    pool, both, met = scheduler.pool, threading.Barrier(2, timeout=20), set[int]()
    classify = pool.classify

    def together(rows: list[Labelled]) -> list[dict[str, Any]]:
        if threading.get_ident() not in met:
            met.add(threading.get_ident())
            both.wait()  # Broken, and so told as an error, unless another thread is here too.
        return classify(rows)

    pool.classify = together  # type: ignore[method-assign]
    jobs, told = asked(120)
    for job in jobs:
        scheduler.submit(job)
    wait_until(lambda: all(told), 30)
    assert len(met) == 2
    with pool.lock:
        for job, (answers,) in zip(jobs, told, strict=True):
            (single,) = classify(pool.encode(pool.ready(job.name), job.rows))
            assert answers[0]["label"] == single["label"]
            assert answers[0]["probabilities"] == pytest.approx(single["probabilities"], abs=1e-5)
    assert not pool.is_in_use


def test_a_text_waits_for_the_room_that_another_thread_s_adapter_takes(schedule: Callable[..., Scheduler]) -> None:
    scheduler = schedule(max_adapters=1)
    jobs, told = asked(30)
    for job in jobs:
        scheduler.submit(job)
    wait_until(lambda: all(told), 30)
    assert all(isinstance(answers, list) for (answers,) in told), "nobody is sent away"
    assert len(scheduler.pool.bank.names) == 1


def test_one_thread_computes_where_torch_has_one(schedule: Callable[..., Scheduler]) -> None:
    scheduler = schedule(threads=1)
    assert scheduler.pool.num_lanes == 1
    (thread,) = scheduler._threads
    assert thread.is_alive()


def test_all_who_wait_are_told_when_nothing_can_be_computed_any_more(schedule: Callable[..., Scheduler]) -> None:
    scheduler = schedule()
    hold = threading.Event()

    def fail(name: str) -> Any:
        hold.wait(20)
        raise SystemError("the interpreter is at its end")

    scheduler.pool.release = fail  # type: ignore[assignment,method-assign]
    jobs, told = asked(40)
    for job in jobs:
        scheduler.submit(job)
    called = scheduler.call(lambda: 1)
    hold.set()
    wait_until(lambda: all(told), 30)
    with contextlib.suppress(Stopping):
        assert called.result(20) == 1, "done before, or told"
    assert any(isinstance(each[0], Stopping) for each in told)
    assert scheduler.failure == "SystemError: the interpreter is at its end"
    assert not scheduler.is_alive
    with pytest.raises(Stopping):
        scheduler.submit(jobs[0])


def test_texts_that_are_just_being_taken_count_as_waiting(schedule: Callable[..., Scheduler]) -> None:
    scheduler, begun, hold = schedule(threads=1), threading.Event(), threading.Event()
    encode = scheduler.pool.encode

    def encode_late(*words: Any) -> list[Labelled]:
        begun.set()
        hold.wait(20)
        return encode(*words)

    scheduler.pool.encode = encode_late  # type: ignore[method-assign]
    (first, many, more), told = asked(3)
    many.rows, more.rows = [{"text": "aa"}] * 990, [{"text": "aa"}] * 20
    scheduler.call(lambda: [scheduler.submit(first), scheduler.submit(many)])
    assert begun.wait(20)
    assert scheduler.num_waiting == 990
    with pytest.raises(Busy, match="990 texts are waiting already"):
        scheduler.submit(more)
    hold.set()
    wait_until(lambda: all(told[:2]), 30)


def test_who_gives_up_a_call_harms_nobody(schedule: Callable[..., Scheduler]) -> None:
    scheduler, hold = schedule(), threading.Event()
    first, given_up = scheduler.call(hold.wait), scheduler.call(lambda: 1)
    given_up.cancel()
    hold.set()
    assert first.result(20)
    assert scheduler.call(lambda: 2).result(20) == 2
    assert scheduler.is_alive


def test_a_call_that_waits_when_the_time_to_stop_is_up_is_told(schedule: Callable[..., Scheduler]) -> None:
    scheduler, hold, begun = schedule(threads=1), threading.Event(), threading.Event()
    scheduler.call(lambda: begun.set() or hold.wait(20))
    assert begun.wait(20)
    waiting = scheduler.call(lambda: 1)
    scheduler.stop(0.1)
    with pytest.raises(Stopping):
        waiting.result(20)
    hold.set()
