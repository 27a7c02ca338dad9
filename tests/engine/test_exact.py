"""Equal or refused, at the level of the loop: killed anywhere, it ends bit for bit as if nothing had happened."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.test_train import Notes, run
from engine.tiny import Bag, Letters
from lora_cli.engine.train import Outcome
from lora_cli.spec import SCHEDULES, TrainSpec


class Killed(BaseException):
    """What no handler of ours expects."""


class KilledAt(Letters):
    """The task, until the loss of one micro-step (from 0) of this process."""

    def __init__(self, micro_step: int) -> None:
        self._left = micro_step

    def loss(self, logits, batch):
        if self._left == 0:
            raise Killed
        self._left -= 1
        return super().loss(logits, batch)


class Fragile(Notes):
    """A recorder killed at one call (from 0) of any kind, before or after it does its work."""

    def __init__(self, number: int, *, after: bool) -> None:
        super().__init__()
        self._left, self._after = number, after

    def _call(self, work, *words, **more) -> None:
        self._left -= 1
        if self._left == -1 and not self._after:
            raise Killed
        work(*words, **more)
        if self._left == -1:
            raise Killed

    def metrics(self, step, values) -> None:
        self._call(super().metrics, step, values)

    def scored(self, step, metrics, *, best) -> None:
        self._call(super().scored, step, metrics, best=best)

    def checkpoint(self, checkpoint) -> None:
        self._call(super().checkpoint, checkpoint)


def fresh() -> Bag:
    torch.manual_seed(0)
    return Bag(dropout=0.3)


def resumed(spec: TrainSpec, notes: Notes) -> tuple[Bag, Outcome, Notes]:
    """To the end from the newest checkpoint that `notes` has, its rows cut to that step."""
    model = fresh()
    checkpoint = copy.deepcopy(notes.checkpoints[-1]) if notes.checkpoints else None
    at = checkpoint.progress.step if checkpoint else 0
    rest = Notes()
    rest.rows = [row for row in notes.rows if row[0] <= at]
    outcome, rest = run(model, spec, resume=checkpoint, notes=rest)
    return model, outcome, rest


def check(spec: TrainSpec, killed: Notes) -> None:
    whole = fresh()
    expected, notes = run(whole, spec)
    model, outcome, rest = resumed(spec, killed)
    assert rest.rows == notes.rows
    assert torch.equal(model.head.weight, whole.head.weight)
    assert torch.equal(model.head.bias, whole.head.bias)
    for name in ("step", "best_step", "best_value", "stale", "stopped_early", "rows", "tokens"):
        assert getattr(outcome.progress, name) == getattr(expected.progress, name), name
    assert all(torch.equal(outcome.best[name], tensor) for name, tensor in expected.best.items())


def killed_in_steps(spec: TrainSpec, *micro_steps: int) -> Notes:
    """Killed once for each number, the micro-steps of each process counted anew; a number too large kills nobody."""
    notes = Notes()
    for number in micro_steps:
        checkpoint = copy.deepcopy(notes.checkpoints[-1]) if notes.checkpoints else None
        notes.rows = [row for row in notes.rows if checkpoint and row[0] <= checkpoint.progress.step]
        with contextlib.suppress(Killed):
            run(fresh(), spec, resume=checkpoint, notes=notes, task=KilledAt(number))
    return notes


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("micro_step", range(1, 27, 5))
def test_every_schedule_killed_in_the_middle_of_steps(schedule: str, micro_step: int) -> None:
    spec = TrainSpec(
        epochs=3, batch_size=6, accumulation=2, lr=1e-2, schedule=schedule, save_every=3, eval_every=4, log_every=2
    )
    check(spec, killed_in_steps(spec, micro_step))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", range(18))
def test_killed_at_any_line_scoring_and_checkpoint(number: int, after: bool) -> None:
    spec = TrainSpec(epochs=3, batch_size=6, accumulation=2, lr=1e-2, save_every=3, eval_every=4, log_every=2)
    notes = Fragile(number, after=after)
    with pytest.raises(Killed):
        run(fresh(), spec, notes=notes)
    check(spec, notes)


SPECS = st.builds(
    TrainSpec,
    epochs=st.sampled_from([3.0, 3.5, 5.0]),
    batch_size=st.integers(5, 20),
    accumulation=st.integers(1, 4),
    length_window=st.integers(1, 3),
    lr=st.sampled_from([1e-5, 1e-2, 0.3]),
    schedule=st.sampled_from(SCHEDULES),
    warmup=st.sampled_from([0.0, 0.06, 0.5]),
    eval_every=st.none() | st.integers(1, 4),
    save_every=st.none() | st.integers(1, 4),
    log_every=st.integers(1, 5),
    patience=st.none() | st.integers(1, 3),
)


@settings(max_examples=12, deadline=None)
@given(SPECS, st.lists(st.integers(0, 30), min_size=1, max_size=3))
def test_any_training_killed_any_times(spec: TrainSpec, micro_steps: list[int]) -> None:
    check(spec, killed_in_steps(spec, *micro_steps))
