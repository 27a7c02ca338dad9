"""A training that is asked to stop keeps all it has done, at any moment, and ends as if nobody had asked."""

from __future__ import annotations

import copy

import pytest
import torch

from engine.test_train import Notes, run
from engine.tiny import Bag
from lora_cli.engine.train import Outcome, Stopped
from lora_cli.spec import TrainSpec

SPEC = TrainSpec(epochs=3, batch_size=6, accumulation=2, lr=1e-2, save_every=3, eval_every=4, log_every=2)
"""15 steps of up to 2 micro-steps; 27 micro-steps and 4 scorings."""
PATIENT = TrainSpec(epochs=50, batch_size=10, lr=1e-6, eval_every=1, patience=3)


class StopAt:
    """Asked for at a micro-step or in a scoring, each counted from 0 in this training."""

    def __init__(self, *, micro_step: int | None = None, scoring: int | None = None) -> None:
        self._micro_step, self._scoring = micro_step, scoring
        self._micro_steps = self._scorings = -1

    @property
    def is_asked(self) -> bool:
        self._micro_steps += 1
        return self._micro_steps == self._micro_step

    def unless_asked(self, work):
        self._scorings += 1
        return None if self._scorings == self._scoring else work()


@pytest.fixture
def model() -> Bag:
    torch.manual_seed(0)
    return Bag(dropout=0.3)


def stopped_and_continued(model: Bag, spec: TrainSpec, *stops: StopAt) -> tuple[Outcome, Notes]:
    """The training with these stops, one after the other; each begins with the model as it was at first."""
    notes, rows = Notes(), []
    for stop in stops:
        with pytest.raises(Stopped):
            run(copy.deepcopy(model), spec, resume=newest(notes), notes=notes, stop=stop)
        at = newest(notes).progress
        rows = [row for row in notes.rows if row[0] <= at.step]
        notes.rows = rows
    return run(model, spec, resume=newest(notes), notes=notes)


def newest(notes: Notes):
    return copy.deepcopy(notes.checkpoints[-1]) if notes.checkpoints else None


def check_equal(model: Bag, spec: TrainSpec, *stops: StopAt) -> None:
    whole = copy.deepcopy(model)
    expected, notes = run(whole, spec)
    found, again = stopped_and_continued(model, spec, *stops)
    assert again.rows == notes.rows
    assert torch.equal(model.head.weight, whole.head.weight)
    assert found.progress.best_step == expected.progress.best_step
    assert found.progress.step == expected.progress.step
    assert all(torch.equal(found.best[name], tensor) for name, tensor in expected.best.items())


@pytest.mark.parametrize("micro_step", range(27))
def test_stopped_at_any_micro_step_the_end_is_the_same(model: Bag, micro_step: int) -> None:
    check_equal(model, SPEC, StopAt(micro_step=micro_step))


@pytest.mark.parametrize("scoring", range(4))
def test_a_scoring_that_is_left_is_done_again(model: Bag, scoring: int) -> None:
    check_equal(model, SPEC, StopAt(scoring=scoring))


def test_the_same_scoring_can_be_left_twice(model: Bag) -> None:
    check_equal(model, SPEC, StopAt(scoring=1), StopAt(scoring=0), StopAt(micro_step=3))


@pytest.mark.parametrize("scoring", range(4))
def test_patience_counts_on_after_a_scoring_that_was_left(model: Bag, scoring: int) -> None:
    check_equal(model, PATIENT, StopAt(scoring=scoring))


def test_one_micro_step_at_a_time(model: Bag) -> None:
    check_equal(model, SPEC, *(StopAt(micro_step=2) for _ in range(12)))


def test_a_step_that_is_saved_already_is_not_saved_again(model: Bag) -> None:
    # Steps 0 to 4 take 9 micro-steps, step 5 two.
    notes = Notes()
    with pytest.raises(Stopped):
        run(model, SPEC, notes=notes, stop=StopAt(micro_step=11))
    assert [checkpoint.progress.step for checkpoint in notes.checkpoints] == [3, 6]
