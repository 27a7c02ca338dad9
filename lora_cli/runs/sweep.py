"""A sweep's folder: what became of each job, whoever ran it and where.

runs/2026-11-23_sweep_r-seed_1a2b3c4d/
    multirun.yaml  command.txt  leaderboard.json  leaderboard.csv  report.html
    jobs/0.json  jobs/1.json  ...
    0/  1/  ...                         a run each, but for jobs that were found finished elsewhere
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import NoReturn

from lora_cli.disk import open_plain, shown, write_atomic
from lora_cli.errors import ConfigError, RunError, UnknownName, printable
from lora_cli.runs.directory import RunDirectory, read_json, write_json

__all__ = [
    "DONE",
    "STUDY",
    "TRAINED",
    "SweepJob",
    "check_folder",
    "claim",
    "end_dead",
    "find_sweep",
    "leave",
    "read_command",
    "read_jobs",
    "record",
    "states",
    "write_command",
]

_COMMAND = "command.txt"
_MAX_COMMAND = 1 << 16
_MAX_JOBS = 1 << 16
STUDY = "study.jsonl"
"""What a search keeps in its folder."""
_LOOKS_S = 0.1
_LOGS = (".txt", ".log", ".out", ".err")


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
    """waiting, running, finished, found (finished before this command began), failed, interrupted, pruned (stopped by a
    search, as others were better by then), or left (not finished, and not asked for any more)."""
    pid: int | None = None
    """Process that runs it."""
    signature: str | None = None
    """That of its configuration, by which it is known again; None: it is not valid."""

    @property
    def is_invalid(self) -> bool:
        """Whether its configuration is not valid, so that it can never be trained."""
        return self.status == "failed" and self.signature is None


def record(folder: Path, job: SweepJob) -> None:
    """Write down what became of a job, in place of what was known of it."""
    run = job.run
    if run is not None and (there := Path(run).resolve()).is_relative_to(own := folder.resolve()):
        run = there.relative_to(own).as_posix()
    write_json(folder / "jobs" / f"{job.number}.json", {**dataclasses.asdict(job), "run": run})


def claim(folder: Path, job: SweepJob) -> SweepJob:
    """`job` with the number under which it has its place in the folder: that of the same configuration if it is there,
    else its own if nobody has it, else the next. Of several that ask at the same time each gets one of its own.
    """
    known = [each for each in read_jobs(folder) if _are_same(each, job)]
    if known:
        numbers = [each.number for each in known]
        return job if job.number in numbers else dataclasses.replace(job, number=numbers[0])
    jobs = folder / "jobs"
    jobs.mkdir(parents=True, exist_ok=True)
    taken = [int(file.stem) for file in jobs.glob("*.json") if file.stem.isdigit()]
    for number in chain([job.number], count(max(taken, default=-1) + 1)):
        with suppress(FileExistsError):
            (jobs / f"{number}.json").touch(exist_ok=False)
            break
    own = dataclasses.replace(job, number=number)
    record(folder, dataclasses.replace(own, run=None, status="waiting"))
    return own


def states(folder: Path) -> dict[int, int]:
    """Number of each job → when it was last written of."""
    return {job.number: (folder / "jobs" / f"{job.number}.json").stat().st_mtime_ns for job in read_jobs(folder)}


def leave(folder: Path, before: Mapping[int, int]) -> None:
    """Expect no more of jobs that are not finished and of which nothing was written since `states` was `before`."""
    now = states(folder)
    for job in read_jobs(folder):
        if job.status not in DONE and before.get(job.number) == now[job.number]:
            record(folder, dataclasses.replace(job, status="left"))


def end_dead(folder: Path, *, patience_s: float = 0.0) -> None:
    """Note as interrupted what jobs/ and a run say is running, though its process is gone.

    Processes of this machine have `patience_s` to end by themselves.
    """
    latest = time.monotonic() + patience_s
    while time.monotonic() < latest and any(job.status == "running" and _is_here(job) for job in read_jobs(folder)):
        time.sleep(_LOOKS_S)
    for job in read_jobs(folder):
        if job.status == "running" and not _is_alive(job):
            record(folder, dataclasses.replace(job, status="interrupted"))
            if job.run is not None:
                RunDirectory(Path(job.run)).died("interrupted")


def check_folder(folder: Path, *, anew: bool, searching: bool) -> None:
    """Refuse a folder in which a sweep, or a search, cannot begin or go on; with `anew` it may not go on.

    Raises:
        ConfigError: it holds something else.
    """

    def refuse(why: str) -> NoReturn:
        raise ConfigError("hydra.sweep.dir", shown(folder), why)

    if not folder.is_dir():
        return
    if RunDirectory(folder).is_begun:
        refuse("is a run; choose another folder")
    if (folder / "jobs").is_dir():
        if anew:
            refuse("holds a sweep already; sweep.redo=all needs a folder of its own")
        if (folder / STUDY).exists() != searching:
            refuse(f"holds a {'sweep that is no search' if searching else 'search'}; choose another folder")
        return
    if not (folder / "multirun.yaml").exists():
        # What commands say is often sent to a file where their results will be.
        others = (file for file in sorted(folder.iterdir()) if file.suffix not in _LOGS and file.name[0] != ".")
        if other := next(others, None):
            refuse(f"holds something else than a sweep ({printable(other.name, 40)}); choose another folder")


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
    if RunDirectory(Path(name)).is_begun:
        raise RunError(f"sweep={name}: a run, not a sweep: run={name}")
    raise UnknownName("sweep", name, ["latest", *folders], "sweep")


def _is_alive(job: SweepJob) -> bool:
    """Whether a process runs the job, on this machine or on another that shares the folder."""
    return _is_here(job) or (job.run is not None and RunDirectory(Path(job.run)).is_held)


def _is_here(job: SweepJob) -> bool:
    """Whether another process of this machine runs the job."""
    if job.pid is None or job.pid == os.getpid():
        return False
    with suppress(ProcessLookupError, PermissionError):
        os.kill(job.pid, 0)
        return True
    return False


def _are_same(some: SweepJob, other: SweepJob) -> bool:
    """Whether two are the same configuration, as far as one is known."""
    if some.signature is None or other.signature is None:
        return some.signature == other.signature and some.overrides == other.overrides
    return some.signature == other.signature


def _checked(values: dict[str, object], folder: Path) -> SweepJob:
    number, overrides, status = values["number"], values["overrides"], str(values["status"])
    if type(number) is not int or not isinstance(overrides, Sequence):
        raise ValueError
    texts = {name: None if values.get(name) is None else str(values[name]) for name in ("run", "error", "signature")}
    # What was found elsewhere lies below runs/: a bare name is within the sweep.
    if (run := texts["run"]) is not None and ("/" not in run or (folder / run).is_dir()):
        texts["run"] = str(folder / run)
    pid = values.get("pid")
    return SweepJob(
        number,
        tuple(map(str, overrides)),
        texts["run"],
        texts["error"],
        status,
        pid if type(pid) is int else None,
        texts["signature"],
    )
