"""Hydra launchers of our own, which decide where the jobs of a sweep run.

Hydra imports its plug-ins with every command, so what only a sweep needs is imported late.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import open_dict

from lora_cli import isolation
from lora_cli.config import Job, compose, group_flags, to_plain
from lora_cli.errors import INTERRUPTED, ConfigError, LoraError, RunError, in_words
from lora_cli.machine import processors
from lora_cli.runs.directory import RunDirectory, signature
from lora_cli.runs.registry import finished_runs
from lora_cli.runs.starts import pinned
from lora_cli.runs.sweep import TRAINED, SweepJob, claim, read_jobs, record
from lora_cli.screen import Screen, significant
from lora_cli.spec import LOSS_DOWNWARDS, TrainRun
from lora_cli.words import without_hydras

if TYPE_CHECKING:
    from lora_cli.reuse import Known

__all__ = ["Fused", "Isolated", "run_here"]

_LOOKS_S = 0.5
"""How often the last line of a running job is read."""
_HINTS = {-9: ", as the system does when memory runs out", -6: ", as compiled code does when memory runs out"}
"""Exit code of a killed process → what it mostly means."""
_NO_MEMORY = ("MemoryError", "bad_alloc")
"""What Python and C++ say for themselves when there is too little left for a command's own words."""


def run_here(job: Job) -> float | None:
    """Train a job of a sweep in this process, as all launchers but ours have it; what becomes of it is noted.

    Returns its metric, None if it failed: one job's failure costs the sweep that one job.
    """
    assert job.sweep is not None
    assert job.sweep_number is not None
    assert job.directory is not None
    folder, path, noted = job.sweep, job.directory, SweepJob(job.sweep_number, job.overrides)
    try:
        spec: TrainRun = job.spec()
        noted = claim(folder, replace(noted, signature=signature(to_plain(pinned(spec)))))
        if path.name == str(job.sweep_number):
            path = path.with_name(str(noted.number))
        noted = replace(noted, run=str(path))
        record(folder, replace(noted, status="running", pid=os.getpid()))
        if spec.sweep.redo == "missing":
            spec = replace(spec, resume="auto")
        from lora_cli.commands import train
        from lora_cli.reuse import clear

        if why := clear(path):
            Screen().warning(why)
        value = train.run(spec, directory=path, overrides=job.overrides)
    except KeyboardInterrupt as error:
        if noted.run is not None:
            record(folder, replace(noted, status="interrupted"))
        raise type(error)("the same command does the rest") from error
    except Exception as error:
        _failed(Screen(), folder, noted if noted.signature else claim(folder, noted), in_words(error))
        return None
    record(folder, noted)
    return value


@dataclass(frozen=True)
class _Job:
    """A point of the sweep whose configuration is good."""

    noted: SweepJob
    spec: TrainRun
    words: tuple[str, ...]
    """What makes it this job, and how it is to run here."""
    folder: Path

    @property
    def output(self) -> Path:
        """Where it says how it goes."""
        return self.folder / "output.txt"


@dataclass
class _Running:
    """A process, and those of its jobs that have not ended."""

    jobs: dict[int, _Job]
    process: BaseProcess
    place: int
    """Which of the `n_jobs` places it has."""
    output: Path
    """What it says."""
    news: Connection | None = None
    """Where it says which of its jobs has ended, and why if before its time; None: its own end is its only job's."""
    is_hopeless: bool = False
    """It has been asked to stop."""


class Isolated(Launcher):
    """Each job an ordinary `lora train` in a process of its own, which costs nobody else anything, however it ends.

    The processes are forked from one that has done the imports, so each starts in milliseconds. `n_jobs` run at a time;
    on a machine with several GPUs each has one for itself, on a CPU its share of the threads.
    """

    __module__ = "hydra_plugins.lora"  # Where Hydra finds it.

    def __init__(self, n_jobs: int = 1) -> None:
        if type(n_jobs) is not int or n_jobs < 1:
            raise ConfigError("hydra.launcher.n_jobs", n_jobs, "a whole number, 1 or more")
        self._n_jobs = n_jobs
        self._screen = Screen()
        self._config: Any = None
        self._context: Any = None
        self._shared: set[str] = set()
        """Words that all jobs have."""
        self._is_introduced = False
        self.judge: Callable[[int, Path], bool] | None = None
        """Tells of a running job, by its number and run folder, whether it is to be stopped as hopeless."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Hydra's way of handing over what it knows; the job function is not needed, each job is a command line."""
        self._context, self._config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run these jobs to their end, and return each one's metric (None of one that failed) in their order."""
        folder = Path(self._config.hydra.sweep.dir)
        self._introduce(folder, job_overrides)
        found = finished_runs()
        known: Known = {}
        returned: dict[int, float | None] = {}
        waiting: list[_Job] = []
        numbers: list[int | None] = []
        unlogged: list[_Job] = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            job = self._made(folder, number, overrides)
            own = job.noted.number if job else None
            if job is not None and own in numbers:
                self._screen.fact(_number(job.noted), f"{_title(job.noted, self._shared)}: given again, trained once")
            elif job is not None and self._is_found(folder, job, found, known, returned):
                unlogged += [job] * (job.spec.tracker.name != "none")
            elif job is not None:
                record(folder, replace(job.noted, status="waiting"))
                waiting.append(job)
            numbers.append(own)
        if unlogged:
            tracker = f"tracker={unlogged[0].spec.tracker.name}"
            self._screen.warning(
                f"{tracker} is told nothing of what was found ({_numbers(unlogged)}); sweep.redo=all trains these again"
            )
        self._run(folder, deque(self._shared_out(waiting)), returned)
        reached = [None if own is None else returned.get(own) for own in numbers]
        return [_returned(overrides, value) for overrides, value in zip(job_overrides, reached, strict=True)]

    def _introduce(self, folder: Path, job_overrides: Sequence[Sequence[str]]) -> None:
        """Say what is about to run, once, and find which words all jobs have."""
        typed = set.intersection(*(set(overrides) for overrides in job_overrides))
        if len(job_overrides) == 1:  # What varies is known by what was typed then, if anything does.
            typed &= set(self._config.hydra.overrides.task)
            typed = typed if typed < set(job_overrides[0]) else set()
        self._shared = typed
        if self._is_introduced:
            return
        self._is_introduced = True
        if self._is_search:
            self._screen.fact("sweep", f"search, {self._config.hydra.sweeper.trials} trials{self._pace()} in {folder}")
        else:
            self._screen.fact(
                "sweep", f"{len(job_overrides)} job{'s' * (len(job_overrides) > 1)}{self._pace()} in {folder}"
            )

    @property
    def _is_search(self) -> bool:
        """Whether it is a search of ours that asks for jobs."""
        return str(self._config.hydra.sweeper.get("_target_", "")).startswith("hydra_plugins.lora.")

    def _made(self, folder: Path, number: int, overrides: Sequence[str]) -> _Job | None:
        """The job; None if its configuration is not valid, which has been told and noted then."""
        own = without_hydras(overrides)
        noted = SweepJob(number, tuple(own))
        try:
            spec: TrainRun = compose("train", own)
            noted = replace(noted, signature=signature(to_plain(pinned(spec))))
        except LoraError as error:
            _failed(self._screen, folder, self._placed(folder, noted), str(error), self._shared)
            return None
        noted = self._placed(folder, noted)
        resume = () if spec.sweep.redo == "all" else ("resume=auto",)
        path = folder / self._subdir(noted.number, overrides)
        return _Job(replace(noted, run=str(path)), spec, (*own, *resume, *self._share(spec)), path)

    def _placed(self, folder: Path, noted: SweepJob) -> SweepJob:
        # A search knows its trials by their numbers, and may try the same twice.
        return noted if self._is_search else claim(folder, noted)

    def _subdir(self, number: int, overrides: Sequence[str]) -> str:
        config = self._context.config_loader.load_sweep_config(self._config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return str(config.hydra.sweep.subdir)

    def _share(self, spec: TrainRun) -> list[str]:
        """A job's threads, where several share the processor."""
        if self._n_jobs == 1 or spec.device.threads is not None:
            return []
        return [f"device.threads={max(1, processors() // self._n_jobs)}"]

    def _is_found(
        self, folder: Path, job: _Job, found: Mapping[str, Path], known: Known, returned: dict[int, float | None]
    ) -> bool:
        """Whether the same configuration has been trained on the same rows before; noted then."""
        from lora_cli.reuse import damage, is_current

        wanted = job.spec.candidates() or [job.spec]
        kept = next(filter(None, (found.get(signature(to_plain(pinned(each)))) for each in wanted)), None)
        if kept is None or job.spec.sweep.redo == "all":
            return False
        try:
            if not is_current(RunDirectory(kept), job.spec, known):
                if kept != job.folder and (why := damage(RunDirectory(kept))):
                    self._screen.warning(f"{why}; {_number(job.noted)} does without it")
                return False
        except LoraError:
            return False  # The job itself tells what is wrong with the rows.
        returned[job.noted.number] = value = _metric(kept, job.spec)
        record(folder, replace(job.noted, run=str(kept), status="found"))
        where = "" if kept == job.folder else f" in {kept}"
        self._screen.fact(
            _number(job.noted), f"{_title(job.noted, self._shared)}: {_reached(job.spec, value)}, found{where}"
        )
        return True

    def _pace(self) -> str:
        """How many run at once, in words."""
        return f", {self._n_jobs} at a time,"

    def _shared_out(self, jobs: Sequence[_Job]) -> list[list[_Job]]:
        """The jobs of each process."""
        return [[job] for job in jobs]

    def _run(self, folder: Path, waiting: deque[list[_Job]], returned: dict[int, float | None]) -> None:
        running: list[_Running] = []
        try:
            while waiting or running:
                while waiting and len(running) < self._n_jobs:
                    self._start(folder, waiting.popleft(), running)
                signs = [sign for each in running for sign in (each.news, each.process.sentinel) if sign is not None]
                ended = wait(signs, timeout=_LOOKS_S)
                for each in list(running):
                    self._read_news(folder, each, returned)
                    if each.process.sentinel in ended:
                        running.remove(each)
                        self._ended(folder, each, returned)
                for each in [each for each in running if not each.is_hopeless]:
                    judge = self.judge
                    if judge and all(judge(number, job.folder) for number, job in each.jobs.items()):
                        each.is_hopeless = True
                        each.process.terminate()
                self._screen.running(
                    [
                        f"{_number(job.noted)} {isolation.last_line(job.output)}"
                        for each in running
                        for job in each.jobs.values()
                    ]
                )
        except BaseException as error:
            self._screen.running([])
            for each in running:
                each.process.terminate()
            _join(running)
            for each in running:
                self._read_news(folder, each, returned)
                for job in each.jobs.values():
                    record(folder, replace(job.noted, status="interrupted"))
            if isinstance(error, KeyboardInterrupt):
                raise type(error)("the same command does the rest") from error
            raise
        finally:
            self._screen.running([])

    def _start(self, folder: Path, jobs: Sequence[_Job], running: list[_Running]) -> None:
        place = min(set(range(self._n_jobs)) - {each.place for each in running})
        from lora_cli.reuse import clear

        for job in jobs:
            if why := clear(job.folder):
                self._screen.warning(why)
            job.folder.mkdir(parents=True, exist_ok=True)
        # At once, so that whatever interrupts what follows finds it among those to be stopped.
        running.append(self._started(folder, jobs, place))
        for job in jobs:
            record(folder, replace(job.noted, status="running", pid=running[-1].process.pid))
            self._screen.fact(_number(job.noted), f"{_title(job.noted, self._shared)}: in {job.folder}")

    def _started(self, folder: Path, jobs: Sequence[_Job], place: int) -> _Running:
        """A process that runs these jobs."""
        [job] = jobs
        words = [*group_flags(), *job.words, f"hydra.run.dir={job.folder}"]
        process = isolation.start_logged("train", words, job.output, environ=self._card(job.spec, place))
        return _Running({job.noted.number: job}, process, place, job.output)

    def _card(self, spec: TrainRun, place: int) -> dict[str, str]:
        """Environment by which a job sees one GPU only, where several run at once."""
        if self._n_jobs == 1 or spec.device.name == "cpu":
            return {}
        from lora_cli.engine.device import one_card

        return one_card(place)

    def _read_news(self, folder: Path, each: _Running, returned: dict[int, float | None]) -> None:
        """Note what a process of several jobs has said of their ends."""
        with suppress(EOFError):
            while each.news is not None and each.news.poll():
                number, why = each.news.recv()
                job = each.jobs.pop(number)
                if why == INTERRUPTED:
                    record(folder, replace(job.noted, status="interrupted"))
                elif why is not None:
                    _failed(self._screen, folder, job.noted, why, self._shared)
                else:
                    self._finished(folder, job, returned)
            return
        each.news = None

    def _ended(self, folder: Path, each: _Running, returned: dict[int, float | None]) -> None:
        each.process.join()
        code = each.process.exitcode
        for job in each.jobs.values():
            if code != 0 and each.is_hopeless:
                record(folder, replace(job.noted, status="pruned"))
                self._screen.fact(
                    _number(job.noted),
                    f"{_title(job.noted, self._shared)}: stopped early, as others were better by then",
                )
            elif code != 0:
                why = _why(code, each.output)
                _failed(self._screen, folder, job.noted, why, self._shared)
                RunDirectory(job.folder).died("failed", why)
            else:
                self._finished(folder, job, returned)

    def _finished(self, folder: Path, job: _Job, returned: dict[int, float | None]) -> None:
        noted = job.noted
        try:
            returned[noted.number] = value = _metric(job.folder, job.spec)
        except RunError as error:
            _failed(self._screen, folder, noted, str(error), self._shared)
            return
        best = " (best so far)" if self._is_search and _is_best(folder, noted, job.spec, value) else ""
        record(folder, noted)
        self._screen.fact(_number(noted), f"{_title(noted, self._shared)}: {_reached(job.spec, value)}{best}")


class Fused(Isolated):
    """Jobs with the same base model, task and shape of batch in one process, which loads what they share once.

    `adapters` are trained at a time; `mixed` tells whether the rows of all are one batch (null: on a GPU), or they take
    turns. What cannot share a base runs as `isolated` has it.
    """

    __module__ = "hydra_plugins.lora"

    def __init__(self, n_jobs: int = 1, adapters: int = 16, mixed: bool | None = None) -> None:
        super().__init__(n_jobs)
        if type(adapters) is not int or adapters < 1:
            raise ConfigError("hydra.launcher.adapters", adapters, "a whole number, 1 or more")
        if mixed is not None and type(mixed) is not bool:
            raise ConfigError("hydra.launcher.mixed", mixed, "true, false or null")
        self._adapters, self._mixed = adapters, mixed

    def _pace(self) -> str:
        return f", {self._n_jobs} processes at a time," if self._n_jobs > 1 else ""

    def _shared_out(self, jobs: Sequence[_Job]) -> list[list[_Job]]:
        from lora_cli.together import common, why_alone

        groups: dict[object, list[_Job]] = {}
        alone: dict[str, list[_Job]] = {}
        for job in jobs:
            why = why_alone(job.spec)
            groups.setdefault((job.noted.number,) if why else common(job.spec), []).append(job)
            if why:
                alone.setdefault(f"{why} needs a process of its own", []).append(job)
        for group in groups.values():
            if len(group) > 1:
                self._screen.fact(
                    "fused", f"{_numbers(group)} on one {group[0].spec.model.name}; each tells the memory of all"
                )
            elif not why_alone(group[0].spec) and not self._is_search:
                alone.setdefault("no other has its base model, task and shape of batch", []).extend(group)
        for why, them in alone.items():
            self._screen.fact("alone", f"{_numbers(them)}: {why}")
        return list(groups.values())

    def _introduce(self, folder: Path, job_overrides: Sequence[Sequence[str]]) -> None:
        is_new = not self._is_introduced
        super()._introduce(folder, job_overrides)
        if is_new and self._is_search and self._n_jobs == 1:
            self._screen.warning(
                "a search asks for one job at a time: nothing is fused unless hydra.launcher.n_jobs is 2 or more"
            )

    def _started(self, folder: Path, jobs: Sequence[_Job], place: int) -> _Running:
        if len(jobs) == 1:
            return super()._started(folder, jobs, place)
        output = folder / f"output-{jobs[0].noted.number}.txt"
        from lora_cli.together import Part, work

        parts = [Part(job.noted.number, compose("train", job.words), job.folder, job.words) for job in jobs]
        told, news = isolation.forks().Pipe(duplex=False)
        process = isolation.start(
            work,
            parts,
            self._adapters,
            self._mixed,
            news,
            streams=[Path(os.devnull), output, output],
            environ=self._card(jobs[0].spec, place),
        )
        news.close()
        return _Running({job.noted.number: job for job in jobs}, process, place, output, told)


def _failed(screen: Screen, folder: Path, noted: SweepJob, error: str, shared: Collection[str] = ()) -> None:
    record(folder, replace(noted, status="failed", error=error))
    screen.warning(f"job {noted.number} ({_title(noted, shared)}) failed: {error}")


def _title(noted: SweepJob, shared: Collection[str]) -> str:
    """What makes the job another than those beside it."""
    return " ".join(word for word in noted.overrides if word not in shared) or "as it is"


def _returned(overrides: Sequence[str], value: float | None) -> JobReturn:
    # Never as failed: Hydra would raise, and hide what the other jobs reached.
    return JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=value)


def _metric(path: Path, spec: TrainRun) -> float | None:
    metrics = RunDirectory(path).facts()["metrics"]
    value: float | None = metrics.get(spec.task.split, {}).get(spec.task.metrics[0])
    return value


def _is_best(folder: Path, noted: SweepJob, spec: TrainRun, value: float | None) -> bool:
    """Whether no other job of the folder has reached as much."""
    others: list[float | None] = []
    for job in read_jobs(folder):
        if job.run is not None and job.status in TRAINED and job.number != noted.number:
            # A run that is gone or damaged is none to be better than.
            with suppress(RunError):
                others.append(_metric(Path(job.run), spec))
    sign = -1 if spec.task.metrics[0] in LOSS_DOWNWARDS else 1
    return value is not None and all(other is None or sign * value > sign * other for other in others)


def _reached(spec: TrainRun, value: float | None) -> str:
    return f"{spec.task.split}/{spec.task.metrics[0]} {significant(value)}"


def _number(noted: SweepJob) -> str:
    return f"job {noted.number}"


def _numbers(jobs: Sequence[_Job]) -> str:
    """Of one "job 3", of several "jobs 3, 5"."""
    return f"job{'s' * (len(jobs) > 1)} {', '.join(str(job.noted.number) for job in jobs)}"


def _why(code: int | None, output: Path) -> str:
    """What ended a process, in words."""
    line = isolation.last_line(output).removeprefix("lora train: ")
    if any(sign in line for sign in _NO_MEMORY):
        return f"out of memory ({line})"
    if code is not None and code < 0:
        return f"killed by signal {-code}{_HINTS.get(code, '')}"
    return line or f"exit code {code}"


def _join(running: Sequence[_Running]) -> None:
    """Wait for processes that were asked to save and end; interrupted again, ask again, which they obey at once."""
    try:
        for each in running:
            each.process.join()
    except BaseException:
        for each in running:
            each.process.terminate()
        raise
