"""A sweep's folder: what became of each job, whoever ran it and where.

runs/2026-11-23_sweep_r-seed_1a2b3c4d/
    multirun.yaml  command.txt  leaderboard.json  leaderboard.csv  report.html
    jobs/0.json  jobs/1.json  ...
    0/  1/  ...                         a run each, but for jobs that were found finished elsewhere
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lora_cli.disk import open_plain, write_atomic
from lora_cli.errors import RunError, UnknownName
from lora_cli.runs.directory import read_json, write_json

__all__ = ["DONE", "TRAINED", "SweepJob", "find_sweep", "read_command", "read_jobs", "record", "write_command"]

_COMMAND = "command.txt"
_MAX_COMMAND = 1 << 16
_MAX_JOBS = 1 << 16


TRAINED = ("finished", "found")
"""Statuses of which there is a whole run."""
DONE = (*TRAINED, "pruned", "left")
"""Statuses of which nothing is to be done any more."""


@dataclass(frozen=True)
class SweepJob:
    """One point of a sweep."""

    number: int
    overrides: tuple[str, ...]
    run: str | None = None
    """The folder of its run; None if it did not get that far. On disk one within the sweep's folder is relative to it,
    so that a sweep can be moved."""
    error: str | None = None
    """Why it failed; None if it is finished or still runs."""
    status: str = "finished"
    """waiting, running, finished, found (finished before this sweep began, elsewhere), failed, interrupted, pruned
    (stopped by a search, as others were better by then), or left (interrupted, and tried again as a later job)."""
    pid: int | None = None
    """Process that runs it."""


def record(folder: Path, job: SweepJob) -> None:
    """Write down what became of a job, in place of what was known of it."""
    run = job.run
    if run is not None and Path(run).is_relative_to(folder):
        run = Path(run).relative_to(folder).as_posix()
    write_json(folder / "jobs" / f"{job.number}.json", {**dataclasses.asdict(job), "run": run})


def read_jobs(folder: Path) -> list[SweepJob]:
    """The jobs of a sweep in their order; files that are damaged are none of them."""
    found = []
    for file in (folder / "jobs").glob("*.json"):
        with suppress(RunError, KeyError, TypeError, ValueError):
            found.append(_checked(read_json(file), folder))
        if len(found) > _MAX_JOBS:
            raise RunError(f"{folder}: more than {_MAX_JOBS:,} jobs")
    return sorted(found, key=lambda job: job.number)


def write_command(folder: Path, line: str) -> None:
    """Keep the words that made the sweep."""
    write_atomic(folder / _COMMAND, f"{line}\n")


def read_command(folder: Path) -> str:
    """The words that made the sweep; "" if they are not there."""
    with suppress(RunError), open_plain(folder / _COMMAND, RunError, limit=_MAX_COMMAND) as file:
        return file.read(_MAX_COMMAND).decode(errors="replace").strip()
    return ""


def find_sweep(name: str) -> Path:
    """The folder meant by a path, the name of a sweep under runs/, or `latest`.

    Raises:
        RunError: there is none.
        UnknownName: no sweep has such a name.
    """
    folders = {folder.parent.name: folder.parent for folder in sorted(Path("runs").glob("*/jobs"))}
    if name == "latest":
        if not folders:
            raise RunError("sweep=latest: no sweep under runs/ yet; lora train -m makes one")
        return max(folders.values(), key=lambda folder: ((folder / "jobs").stat().st_mtime, folder.name))
    if (Path(name) / "jobs").is_dir():
        return Path(name)
    if name in folders:
        return folders[name]
    raise UnknownName("sweep", name, ["latest", *folders], "sweep")


def _checked(values: dict[str, object], folder: Path) -> SweepJob:
    number, overrides, status = values["number"], values["overrides"], str(values["status"])
    if type(number) is not int or not isinstance(overrides, Sequence):
        raise ValueError
    texts = {name: None if values.get(name) is None else str(values[name]) for name in ("run", "error")}
    # What was found elsewhere lies below runs/: a bare name is within the sweep.
    if (run := texts["run"]) is not None and ("/" not in run or (folder / run).is_dir()):
        texts["run"] = str(folder / run)
    return SweepJob(number, tuple(map(str, overrides)), texts["run"], texts["error"], status)
