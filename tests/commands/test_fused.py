"""lora train -m hydra/launcher=fused: jobs on one base, in one process, give the runs that each would give alone."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from commands.conftest import FILMS, TINY, contents
from commands.test_sweep import kill, statuses, when_running

FUSED = ("train", *TINY, *FILMS, "train.epochs=1", "-m", "hydra/launcher=fused")


def test_fused_jobs_are_the_runs_of_isolated_ones_to_the_last_byte(films: Path, call) -> None:
    """What cannot share the base runs beside them, and what is wrong costs nobody else anything."""
    words = (*FUSED, "lora.r=2,0,4", "lora.init=kaiming,eva", "hydra.sweep.dir=fused")
    fused = call(*words)
    assert fused.code == 1, fused.err
    assert statuses(Path("fused")) == ["finished", "finished", "failed", "failed", "finished", "finished"]
    assert "jobs 0, 4 on one tiny-bert" in fused.err
    assert "jobs 1, 5: lora.init=eva needs a process of its own" in fused.err
    assert "1 other trainings on the same base model" in Path("fused/0/output.txt").read_text()
    for number, r in (("0", 2), ("4", 4)):
        alone = call("train", *TINY, *FILMS, "train.epochs=1", f"lora.r={r}", f"hydra.run.dir=alone-{r}")
        assert alone.code == 0, alone.err
        assert contents(Path("fused", number)) == contents(Path(f"alone-{r}"))
        assert json.loads(Path("fused", number, "run.json").read_text())["fused"] == 2
    assert call("verify", "run=fused/4").code == 0
    assert call("report", "run=fused/4").code == 0
    assert "2 trainings on one base model" in Path("fused/4/report.html").read_text(encoding="utf-8")


def test_a_process_that_is_killed_costs_its_jobs_and_the_same_words_go_on_from_their_checkpoints(
    films: Path, call
) -> None:
    words = (*FUSED, "train.batch_size=2", "train.save_every=8", "lora.r=2,4")
    thread = when_running(0, kill, steps=8)
    answer = call(*words)
    thread.join()
    assert answer.code == 1
    assert statuses() == ["failed", "failed"]
    assert "killed by signal 9" in answer.err
    thread = when_running(1, lambda job: os.kill(os.getpid(), signal.SIGTERM), steps=16)
    answer = call(*words)
    thread.join()
    assert answer.code == 143, answer.err
    assert statuses() == ["interrupted", "interrupted"]
    assert call(*words).code == 0
    assert statuses() == ["finished", "finished"]
    alone = [word for word in words if word not in ("-m", "hydra/launcher=fused", "lora.r=2,4")]
    assert call(*alone, "lora.r=4", "hydra.run.dir=alone").code == 0
    (folder,) = Path("runs").glob("*_sweep_*")
    assert contents(folder / "1") == contents(Path("alone"))


def test_who_has_no_partner_is_told_and_a_search_that_nothing_is_fused(films: Path, call) -> None:
    words = (*FUSED, "train.max_steps=1")
    assert (
        "jobs 0, 1: no other has its base model, task and shape of batch" in call(*words, "task.max_length=16,32").err
    )
    search = call(*words, "hydra/sweeper=optuna", "hydra.sweeper.trials=1", "lora.r=2,4")
    (folder,) = Path("runs").glob("*_sweep_r_*")
    first, second, third, fourth, *_ = search.err.splitlines()
    assert first == f"sweep      search, 1 trials in {folder}"
    assert second.endswith("nothing is fused unless hydra.launcher.n_jobs is 2 or more")
    assert third in (f"job 0      lora.r={r}: in {folder}/0" for r in (2, 4))
    assert fourth.startswith("job 0      lora.r=")
    assert fourth.endswith("(best so far)")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("hydra.launcher.adapters=0", "hydra.launcher.adapters=0: a whole number, 1 or more"),
        ("hydra.launcher.mixed=some", "hydra.launcher.mixed=some: true, false or null"),
    ],
)
def test_a_wrong_setting_is_told_before_anything_runs(films: Path, call, word: str, message: str) -> None:
    answer = call(*FUSED, "lora.r=2,4", word)
    assert answer.code == 2
    assert message in answer.err
