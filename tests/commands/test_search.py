"""lora train -m hydra/sweeper=optuna: a search that goes on where it was, and stops what is hopeless."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path

import pytest

from commands.conftest import FILMS, TINY
from commands.test_sweep import sweep_folder, when_running
from lora_cli.launchers import Isolated
from lora_cli.runs.sweep import read_jobs

SEARCH = ("train", *TINY, *FILMS, "train.epochs=1", "-m", "hydra/sweeper=optuna", "hydra.sweeper.prune=false")


def tried() -> list[dict[str, str]]:
    return [dict(word.split("=", 1) for word in job.overrides) for job in read_jobs(sweep_folder())]


@pytest.mark.slow
def test_a_search_tries_so_many_and_more_only_if_more_are_asked_for(films: Path, call) -> None:
    open_keys = ("lora.r=2,4", "train.lr=tag(log,interval(1e-4,1e-2))", "lora.alpha=int(interval(4,16))")
    answer = call(*SEARCH, *open_keys, "hydra.sweeper.trials=3")
    assert answer.code == 0, answer.err
    first = tried()
    assert len(first) == 3
    assert {values["lora.r"] for values in first} <= {"2", "4"}
    assert all(1e-4 <= float(values["train.lr"]) <= 1e-2 for values in first)
    assert all(4 <= int(values["lora.alpha"]) <= 16 for values in first)
    rows = list(csv.DictReader((sweep_folder() / "leaderboard.csv").read_text().splitlines()))
    assert len(rows) == 3
    best = next(line for line in answer.err.splitlines() if line.startswith("best"))
    assert f"validation/accuracy {float(rows[0]['mean']):.4f}" in best

    assert call(*SEARCH, *open_keys, "hydra.sweeper.trials=3").code == 0
    assert tried() == first
    assert call(*SEARCH, *open_keys, "hydra.sweeper.trials=4").code == 0
    assert tried()[:3] == first
    assert len({json.dumps(values) for values in tried()}) == 4, "nothing is suggested twice"


@pytest.mark.slow
def test_a_search_that_is_stopped_tries_again_what_it_was_at(films: Path, call) -> None:
    words = (*SEARCH, "lora.alpha=int(interval(4,1000))", "hydra.sweeper.trials=2")
    words = (*words, "train.batch_size=2", "train.save_every=8")
    thread = when_running(0, lambda job: os.kill(os.getpid(), signal.SIGTERM), steps=8)
    assert call(*words).code == 143
    thread.join()
    (interrupted,) = tried()
    assert call(*words).code == 0
    assert interrupted in tried()[1:]
    assert sorted(job.status for job in read_jobs(sweep_folder()))[:2] == ["finished", "finished"]


@pytest.mark.slow
def test_what_is_hopeless_is_stopped_and_costs_nobody_the_exit_code(films: Path, call, monkeypatch) -> None:
    made = Isolated.__init__

    def hopeless(self: Isolated, n_jobs: int = 1) -> None:
        made(self, n_jobs)
        self.judge = lambda number, path: number == 0 and (path / "metrics.jsonl").exists()

    monkeypatch.setattr(Isolated, "__init__", hopeless)
    slow = ("train.epochs=20", "train.batch_size=2", "train.eval_every=5")
    answer = call("train", *TINY, *FILMS, "-m", "seed=1,2", *slow, "train.max_steps=60")
    assert answer.code == 0, answer.err
    assert [job.status for job in read_jobs(sweep_folder())] == ["pruned", "finished"]
    assert "stopped early, as others were better by then" in answer.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["seed=1"], "nothing is left open"),
        (["lora.r=2,4", "hydra.sweeper.trials=0"], "train: hydra.sweeper.trials=0: a whole number, 1 or more"),
        (["lora.r=2,4", "hydra.sweeper.seed=x"], "train: hydra.sweeper.seed=x: a whole number from 0 to 2147483647"),
        (["lora.r=2,4", "hydra.sweeper.prune=maybe"], "train: hydra.sweeper.prune=maybe: true or false"),
        (["train.lr=tag(log,interval(0,1))"], "train.lr"),
        (["train.lr=interval(1e-2,1e-4)"], "train.lr=interval(1e-2,1e-4): the lower end comes first"),
        (
            ["task.metrics=[accuracy],[macro_f1]"],
            "a search has one metric: [accuracy] by validation/accuracy, [macro_f1] by validation/macro_f1",
        ),
        (["lora.r=2,4", "train.lrr=1"], "train.lrr: no such key"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_searched_is_refused_in_one_line(words, told, films: Path, call) -> None:
    answer = call(*SEARCH, *words)
    assert answer.code == 2, answer.err
    assert told in answer.err
    assert len(answer.err.splitlines()) == 1
    assert not list(Path().glob("runs/*/jobs"))
