"""A sweep's folder: who has which place in it, what may be done in it, and what is no longer expected."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from lora_cli.errors import ConfigError
from lora_cli.runs.directory import RunDirectory, write_json
from lora_cli.runs.sweep import SweepJob, check_folder, claim, end_dead, leave, read_jobs, record, states


def job(number: int, r: int, **facts: object) -> SweepJob:
    """A job of its own configuration for each rank; none is valid for rank 0."""
    return replace(SweepJob(number, (f"lora.r={r}",), signature=f"of {r}" if r else None), **facts)


def test_the_same_configuration_has_the_same_place_and_others_a_free_one(scratch: Path) -> None:
    assert [claim(scratch, job(number, r)).number for number, r in enumerate((2, 4, 0))] == [0, 1, 2]
    assert [claim(scratch, job(number, r)).number for number, r in enumerate((0, 4, 8, 16, 2))] == [2, 1, 3, 4, 0]
    assert [each.overrides for each in read_jobs(scratch)] == [(f"lora.r={r}",) for r in (2, 4, 0, 8, 16)]
    assert claim(scratch, job(9, 32)).number == 9


def test_a_job_that_is_typed_otherwise_is_the_same_if_its_configuration_is(scratch: Path) -> None:
    claim(scratch, job(0, 2))
    assert claim(scratch, replace(job(5, 2), overrides=("lora.r=2", "device.threads=1"))).number == 0


def test_what_was_not_asked_for_again_is_not_expected_any_more(scratch: Path) -> None:
    for number, status in enumerate(("finished", "failed", "interrupted", "failed")):
        record(scratch, job(number, 2 + number, status=status))
    before = states(scratch)
    record(scratch, job(3, 5, status="failed"))
    leave(scratch, before)
    assert [each.status for each in read_jobs(scratch)] == ["finished", "left", "left", "failed"]


def test_what_a_dead_process_could_not_note_is_noted_for_it(scratch: Path) -> None:
    run = RunDirectory.create({"lora": {}}, directory=scratch / "0", overrides=[])
    gone = 2**22 + 1  # Above what Linux gives to a process.
    record(scratch, job(0, 2, status="running", pid=gone, run=str(run.path)))
    record(scratch, job(1, 4, status="running", pid=os.getppid()))
    record(scratch, job(2, 8, status="running", pid=gone, run=str(scratch / "2")))
    with run.held():
        assert run.is_held
        end_dead(scratch)
        assert [each.status for each in read_jobs(scratch)] == ["running", "running", "interrupted"]
    assert not run.is_held
    end_dead(scratch)
    assert [each.status for each in read_jobs(scratch)] == ["interrupted", "running", "interrupted"]
    assert run.facts()["status"] == "interrupted"
    assert run.facts()["error"] == "its process is gone"


@pytest.mark.parametrize("name", ["missing", "empty", "logs", "sweep"])
def test_a_sweep_begins_in_an_empty_folder_or_goes_on_in_its_own(name: str, scratch: Path) -> None:
    folder = scratch / name
    if name != "missing":
        folder.mkdir()
    if name == "logs":
        (folder / "slurm-1.out").touch()
        (folder / ".submitit").mkdir()
    if name == "sweep":
        record(folder, job(0, 2))
    check_folder(folder, anew=False, searching=False)


def test_a_folder_of_something_else_is_refused_by_its_key(scratch: Path) -> None:
    def refusal(name: str, *, anew: bool = False, searching: bool = False) -> str:
        with pytest.raises(ConfigError) as caught:
            check_folder(Path(name), anew=anew, searching=searching)
        return str(caught.value)

    write_json(scratch / "run" / "run.json", {})
    (scratch / "runs" / "2026-11-29_a").mkdir(parents=True)
    for name in ("sweep", "search"):
        record(scratch / name, job(0, 2))
    (scratch / "search" / "study.jsonl").touch()
    assert refusal("run") == "hydra.sweep.dir=run: is a run; choose another folder"
    what = "holds something else than a sweep (2026-11-29_a); choose another folder"
    assert refusal("runs") == f"hydra.sweep.dir=runs: {what}"
    what = "holds a sweep already; sweep.redo=all needs a folder of its own"
    assert refusal("sweep", anew=True) == f"hydra.sweep.dir=sweep: {what}"
    assert refusal("search") == "hydra.sweep.dir=search: holds a search; choose another folder"
    what = "holds a sweep that is no search; choose another folder"
    assert refusal("sweep", searching=True) == f"hydra.sweep.dir=sweep: {what}"
