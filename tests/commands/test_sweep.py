"""lora train -m: each job in a process of its own, whose end costs the others nothing; the same words do the rest."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from commands.conftest import FILMS, TINY, contents, write_films
from lora_cli.runs.sweep import SweepJob, read_jobs

SHORT = ("train", *TINY, *FILMS, "train.epochs=1", "-m")
SLOW = ("train.batch_size=2", "train.save_every=8")
"""Long enough for something to happen to it."""


def sweep_folder() -> Path:
    (folder,) = Path("runs").glob("*_sweep_*")
    return folder


def statuses(folder: Path | None = None) -> list[str]:
    return [job.status for job in read_jobs(folder or sweep_folder())]


def when_running(number: int, act: Callable[[SweepJob], object], *, steps: int = 0) -> threading.Thread:
    """Do something once to the job `number` when it runs and has a checkpoint of `steps` or more."""

    def watch() -> None:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            for job in (job for folder in Path("runs").glob("*_sweep_*") for job in read_jobs(folder)):
                if (job.number, job.status) == (number, "running") and newest_step(Path(str(job.run))) >= steps:
                    act(job)
                    return
            time.sleep(0.005)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def newest_step(run: Path) -> int:
    return max((int(path.name[5:]) for path in run.glob("checkpoints/step-*")), default=0)


def pid_of(job: SweepJob) -> int:
    pid = json.loads((sweep_folder() / "jobs" / f"{job.number}.json").read_text())["pid"]
    assert isinstance(pid, int)
    return pid


def kill(job: SweepJob) -> None:
    os.kill(pid_of(job), signal.SIGKILL)


def starve(job: SweepJob) -> None:
    """No memory beyond what the process has already."""
    pid = pid_of(job)
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.prlimit(pid, resource.RLIMIT_AS, (used, used))


@pytest.mark.slow
def test_a_bad_rank_a_kill_and_lack_of_memory_cost_one_job_each(films: Path, call) -> None:
    """Issue 7's first point."""
    words = (*SHORT, *SLOW, "lora.r=1,2,0,4", "seed=1,2")
    threads = [when_running(3, kill, steps=8), when_running(6, starve, steps=8)]
    answer = call(*words)
    for thread in threads:
        thread.join()
    assert answer.code == 1, answer.err
    folder = sweep_folder()
    assert statuses() == ["finished"] * 3 + ["failed"] * 3 + ["failed", "finished"]
    why = [job.error for job in read_jobs(folder)]
    assert why[3] == "killed by signal 9, as the system does when memory runs out"
    assert all("lora.r=0: a whole number from 1" in why[number] for number in (4, 5))
    # By Python, by torch, or by an abort of compiled code: it depends on who asks for memory next.
    assert "memory" in why[6]
    assert "4 of 8 jobs have not finished; the same command trains the 2 valid ones only" in answer.err
    assert json.loads((folder / "3" / "run.json").read_text())["status"] == "failed"
    assert "resumes" not in (folder / "3" / "output.txt").read_text()
    rows = list(csv.DictReader((folder / "leaderboard.csv").read_text().splitlines()))
    assert {(row["title"], row["seeds"]) for row in rows} == {("lora.r=1", "2"), ("lora.r=2", "1"), ("lora.r=4", "1")}
    for row in rows:
        runs = [Path(run) / "run.json" for run in row["runs"].split()]
        values = [json.loads(run.read_text())["metrics"]["validation"]["accuracy"] for run in runs]
        assert float(row["mean"]) == pytest.approx(sum(values) / len(values))

    before = contents(folder / "0")
    times = {path: path.stat().st_mtime_ns for path in (folder / "0").rglob("*") if path.is_file()}
    again = call(*words)
    assert again.code == 1, "the rank is as bad as before"
    assert statuses() == ["found"] * 3 + ["finished", "failed", "failed", "finished", "found"]
    assert "resumes" in (folder / "3" / "output.txt").read_text()
    assert contents(folder / "0") == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_sweep_that_is_stopped_saves_says_what_is_done_and_the_same_words_do_the_rest(films: Path, call) -> None:
    words = (*SHORT, *SLOW, "seed=1,2,3")
    thread = when_running(1, lambda job: os.kill(os.getpid(), signal.SIGTERM), steps=8)
    answer = call(*words)
    thread.join()
    assert answer.code == 143, "row 72"
    assert answer.err.splitlines()[-1] == "lora train: terminated; the same command does the rest"
    assert statuses() == ["finished", "interrupted", "waiting"]
    assert "2 of 3 jobs have not finished" in answer.err
    assert "validation/accuracy" in answer.out, "what is finished is listed"
    assert call(*words).code == 0
    assert statuses() == ["found", "finished", "finished"]
    alone = call(*(word for word in words if word not in ("-m", "seed=1,2,3")), "seed=2", "hydra.run.dir=alone")
    assert alone.code == 0, alone.err
    assert contents(sweep_folder() / "1") == contents(Path("alone"))


@pytest.mark.slow
def test_jobs_that_run_side_by_side_give_the_bits_of_jobs_in_one_process(films: Path, call) -> None:
    together = call(*SHORT, "lora.r=2,4", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=together")
    assert together.code == 0, together.err
    assert "2 jobs, 2 at a time" in together.err
    here = call(*SHORT, "lora.r=2,4", "hydra/launcher=basic", "hydra.sweep.dir=here", "sweep.redo=all")
    assert here.code == 0, here.err
    for number in "01":
        assert contents(Path("together", number)) == contents(Path("here", number))
    assert statuses(Path("here")) == ["finished", "finished"]
    assert Path("here/leaderboard.json").exists()


@pytest.mark.slow
def test_several_at_a_time_share_the_processor(films: Path, call) -> None:
    words = [word for word in SHORT if not word.startswith("device.threads")]
    assert call(*words, "seed=1,2", "hydra.launcher.n_jobs=2").code == 0
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    for number in "01":
        assert f"device.threads={share} " in (sweep_folder() / number / "output.txt").read_text()


def test_a_sweep_in_a_folder_of_ones_own_grows_and_shrinks(films: Path, call) -> None:
    mine = Path("runs/mine")
    words = (*SHORT, "train.max_steps=2", f"hydra.sweep.dir={mine}")
    assert call(*words, "lora.r=2,0").code == 1
    answer = call(*words, "lora.r=4,2,4")
    assert answer.code == 0, "nobody asked for rank 0 any more"
    assert "job 2      lora.r=4: given again, trained once" in answer.err
    assert [(job.overrides[-1], job.status) for job in read_jobs(mine)] == [
        ("lora.r=2", "found"),
        ("lora.r=0", "left"),
        ("lora.r=4", "finished"),
    ]
    (table,) = json.loads((mine / "leaderboard.json").read_text())["boards"]
    assert {row["title"] for row in table["configurations"]} == {"lora.r=2", "lora.r=4"}

    with (mine / "2" / "adapter" / "adapter_model.safetensors").open("ab") as file:
        file.write(b"!")
    answer = call(*words, "lora.r=2,4", "tracker=tensorboard")
    assert answer.code == 0, answer.err
    what = "runs/mine/2: adapter/adapter_model.safetensors changed since it finished"
    assert f"{what}; kept as runs/mine/2.damaged, trained anew" in answer.err
    assert "tracker=tensorboard is told nothing of what was found (job 0)" in answer.err
    assert statuses(mine) == ["found", "left", "finished"]
    assert (mine / "2" / "tensorboard").is_dir()

    (mine / "0" / "run.json").write_text("{")
    one = call(*words, "lora.r=2", "hydra/launcher=basic")
    assert one.code == 0, one.err
    assert "kept as runs/mine/0.damaged, trained anew" in one.err
    again = call(*words, "lora.r=2", "sweep.redo=all")
    assert (again.code, len(again.err.splitlines())) == (2, 1)
    assert "hydra.sweep.dir=runs/mine: holds a sweep already; sweep.redo=all needs a folder of its own" in again.err


@pytest.mark.slow
def test_what_another_sweep_has_trained_is_used_unless_its_rows_have_changed(films: Path, call) -> None:
    assert call(*SHORT, "seed=1").code == 0
    first = sweep_folder()
    answer = call(*SHORT, "seed=1,2")
    assert answer.code == 0
    (second,) = set(Path("runs").glob("*_sweep_*")) - {first}
    assert [(job.status, job.run) for job in read_jobs(second)] == [
        ("found", str(first / "0")),
        ("finished", str(second / "1")),
    ]
    assert f"found in {first / '0'}" in answer.err

    file = films / "train.csv"
    file.write_text(file.read_text().replace("train 0", "train zero"))
    assert call(*SHORT, "seed=1,2,3", "hydra.sweep.dir=mine").code == 0
    assert statuses(Path("mine")) == ["finished"] * 3
    changed = call(*SHORT, "seed=1,2")
    assert changed.code == 1
    assert "finished on other data, train changed since" in changed.err


@pytest.mark.slow
def test_everything_is_trained_again_on_demand_in_a_folder_of_its_own(films: Path, call) -> None:
    words = (*SHORT, "seed=1,2")
    assert call(*words).code == 0
    first = sweep_folder()
    assert call(*words, "sweep.redo=all").code == 0
    second = first.with_name(f"{first.name}-2")
    assert statuses(second) == ["finished", "finished"]
    assert contents(first / "0") == contents(second / "0")
    assert call(*words).code == 0
    assert statuses(second) == ["found", "found"]


@pytest.mark.slow
def test_a_group_swept_over_is_named_as_it_was_typed(films: Path, call) -> None:
    answer = call(*SHORT, "lora=head,dora", "lora.r=2")
    assert answer.code == 0, answer.err
    (table,) = json.loads((sweep_folder() / "leaderboard.json").read_text())["boards"]
    assert {row["title"] for row in table["configurations"]} == {"lora=head", "lora=dora"}
    assert sweep_folder().name[10:22] == "_sweep_lora_"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_launchers_of_others_run_the_same_sweep_to_the_same_bits(launcher: str, films: Path, call) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    theirs = call(*SHORT, "lora.r=2,0,4", f"hydra/launcher={launcher}", "hydra.sweep.dir=theirs")
    assert theirs.code == 1
    assert "1 of 3 jobs have not finished" in theirs.err
    assert statuses(Path("theirs")) == ["finished", "failed", "finished"]
    ours = call(*SHORT, "lora.r=2,0,4", "hydra.sweep.dir=ours", "sweep.redo=all")
    assert ours.code == 1
    for number in "02":
        assert contents(Path("theirs", number)) == contents(Path("ours", number))
    again = call(*SHORT, "lora.r=2,0,4", f"hydra/launcher={launcher}", "hydra.sweep.dir=theirs")
    assert again.code == 1
    assert statuses(Path("theirs")) == ["finished", "failed", "finished"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs=0: a whole number, 1 or more"),
        (["sweep.redo=some"], "sweep.redo=some: no such choice"),
        (
            ["hydra.sweep.dir=."],
            "hydra.sweep.dir=.: holds something else than a sweep (test.csv); choose another folder",
        ),
        (["hydra.run.dir=x"], "hydra.run.dir=x: is for one run; -m makes a folder of runs: hydra.sweep.dir=DIR"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_words_about_the_sweep_itself_are_refused_before_anything_runs(words, told, scratch: Path, call) -> None:
    write_films(scratch)
    answer = call(*SHORT, "seed=1,2", *words)
    assert answer.code == 2
    assert told in answer.err
    assert not Path("runs").exists()


def test_words_about_a_sweep_are_refused_where_there_is_none(refused) -> None:
    assert refused("train", "hydra/launcher=fused") == "lora train: hydra/launcher=fused: is for a sweep; add -m"
    assert refused("eval", "hydra.sweeper.trials=3") == "lora eval: hydra.sweeper.trials=3: is for a sweep; add -m"
