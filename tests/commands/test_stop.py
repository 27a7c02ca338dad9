"""The first signal saves what is done and says how to go on, whatever the training is at; the second does not wait."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from commands.conftest import FILMS, TINY, contents, write_films
from lora_cli.runs.sweep import read_jobs

WORDS = ("train", *TINY, *FILMS, "train.max_steps=6", "train.eval_every=2", "train.log_every=3", "hydra.run.dir=run")
SIGNALS = [
    (signal.SIGINT, 130, "interrupted"),
    (signal.SIGTERM, 143, "terminated"),
    (signal.SIGUSR1, 143, "terminated"),
]
ENDS_S = 10
"""From the signal to the end."""
TWICE_S = 0.2
"""Between two signals that are not the same one heard twice."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, forked) -> dict[str, bytes]:
    """What the training ends with that nobody stops."""
    home = tmp_path_factory.mktemp("whole")
    write_films(home)
    process = forked(*WORDS, cwd=home)
    assert process.returncode == 0, process.stderr
    return contents(home / "run")


def newest_progress() -> dict[str, object]:
    newest = max(Path("run/checkpoints").glob("step-*"), default=None)
    return json.loads((newest / "state.json").read_text())["progress"] if newest else {}


MOMENTS = [
    pytest.param("engine.micro_step:forward", 1, 1, False, marks=pytest.mark.slow),
    ("engine.micro_step:forward", 3, 3, False),
    pytest.param("engine.micro_step:forward", 4, 4, True, marks=pytest.mark.slow),
    ("experiment:Experiment.score", 2, 4, True),
    pytest.param("experiment:Experiment.score", 3, 6, True, marks=pytest.mark.slow),
    pytest.param("engine.checkpoint:save", 2, 4, False, marks=pytest.mark.slow),
    pytest.param("runs.directory:RunDirectory.append_metrics", 3, 4, False, marks=pytest.mark.slow),
    pytest.param("experiment:Experiment.save", 1, 6, False, marks=pytest.mark.slow),
    ("commands.train:_score", 1, 6, False),
]
"""Before which call the signal comes, the step that is kept, and whether its scoring is still to come."""


@pytest.mark.parametrize(("name", "number", "step", "unscored"), MOMENTS, ids=lambda value: str(value))
def test_a_signal_at_any_moment_keeps_the_step_and_the_end_is_the_same(
    name, number, step, unscored, whole, films, call, before
) -> None:
    came: list[float] = []

    def ask() -> None:
        came.append(time.monotonic())
        signal.raise_signal(signal.SIGTERM)

    before(name, number, ask)
    answer = call(*WORDS)
    assert answer.code == 143, "row 46"
    assert time.monotonic() - came[0] < ENDS_S
    assert answer.err.splitlines()[-1] == "lora train: terminated; lora resume run=run continues it"
    assert json.loads(Path("run/run.json").read_text())["status"] == "interrupted"
    progress = newest_progress()
    assert (progress["step"], progress["unscored"]) == (step, unscored)
    answer = call(*WORDS, "resume=auto")
    assert answer.code == 0, answer.err
    assert f"from step {step}" in answer.err
    assert contents(Path("run")) == whole


@pytest.mark.parametrize(("number", "code", "word"), SIGNALS, ids=lambda value: str(value))
def test_each_signal_has_its_exit_code(number, code, word, films, call, before) -> None:
    before("engine.micro_step:forward", 2, lambda: signal.raise_signal(number))
    answer = call(*WORDS)
    assert (answer.code, newest_progress()["step"]) == (code, 2)
    assert answer.err.splitlines()[-1].startswith(f"lora train: {word}; lora resume")


@pytest.mark.parametrize("name", ["engine.micro_step:forward", "engine.checkpoint:save"])
def test_a_second_signal_does_not_wait(name, films, call, before) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(TWICE_S)
        signal.raise_signal(signal.SIGINT)

    before(name, 2, twice)
    answer = call(*WORDS, "train.save_every=1")
    assert answer.code == 130
    assert newest_progress()["step"] == 1
    assert not list(Path("run/checkpoints").glob(".*"))
    assert json.loads(Path("run/run.json").read_text())["status"] == "interrupted"


def test_a_signal_heard_twice_is_one(films, call, before) -> None:
    before("engine.micro_step:forward", 2, lambda: [signal.raise_signal(signal.SIGTERM) for _ in range(3)])
    assert call(*WORDS).code == 143
    assert newest_progress()["step"] == 2


def test_before_the_first_step_there_is_nothing_to_keep(films, call, before) -> None:
    before("commands.train:load_rows", 1, lambda: signal.raise_signal(signal.SIGUSR1))
    answer = call(*WORDS)
    assert (answer.code, answer.err) == (143, "lora train: terminated\n")
    assert not Path("run/run.json").exists()


def test_a_signal_that_is_ignored_stays_ignored(films, call, before) -> None:
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        before("engine.micro_step:forward", 2, lambda: signal.raise_signal(signal.SIGINT))
        assert call(*WORDS).code == 0
    finally:
        signal.signal(signal.SIGINT, handler)


@pytest.mark.slow
def test_a_sweep_in_one_process_stops_as_a_whole_and_the_same_words_do_the_rest(films, call, before) -> None:
    own = (word for word in WORDS if "hydra" not in word)
    words = (*own, "-m", "seed=1,2,3", "hydra/launcher=basic", "hydra.sweep.dir=runs/mine")
    before("engine.micro_step:forward", 8, lambda: signal.raise_signal(signal.SIGTERM))
    answer = call(*words)
    assert answer.code == 143, "row 72"
    assert answer.err.splitlines()[-1] == "lora train: terminated; the same command does the rest"
    assert [job.status for job in read_jobs(Path("runs/mine"))] == ["finished", "interrupted"]
    answer = call(*words)
    assert answer.code == 0
    assert answer.err.count("resumes") == 1
    assert len(list(Path("runs/mine").glob("*/adapter"))) == 3
