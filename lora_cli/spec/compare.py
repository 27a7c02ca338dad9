"""Verbs that put runs side by side: compare, bench, runs, diff, report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from lora_cli.errors import ConfigError
from lora_cli.spec.adapter import LoraSpec
from lora_cli.spec.checks import at_least, check_seeds, one_of, plain_names
from lora_cli.spec.machine import DeviceSpec, TrainDeviceSpec
from lora_cli.spec.model import ModelSpec
from lora_cli.spec.names import BENCH_LAUNCHERS, RUN_ORDERS, STATUSES, TEXT_METRICS
from lora_cli.spec.tasks import TaskSpec
from lora_cli.spec.training import TrainSpec, known_batch

__all__ = ["BenchRun", "CompareRun", "CompareSpec", "DiffRun", "ReportRun", "RunsRun", "WhereSpec"]


@dataclass(kw_only=True)
class CompareSpec:
    """What is trained side by side."""

    methods: list[str] = field(default_factory=lambda: ["full", "lora"])
    """Options of the group lora, in the order of the table."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Each method is trained once with each of these seeds."""
    train: bool = True
    """Train; false: count parameters, memory and storage only."""
    target: float | None = None
    """Value of the task's first metric on the validation split; the table tells when each method reached it."""
    tasks_stored: int = 100
    """Tasks whose storage is counted with train=false."""

    def __post_init__(self) -> None:
        plain_names("compare.methods", self.methods, "dora")
        check_seeds("compare.seeds", self.seeds)
        if self.target is not None and not math.isfinite(self.target):
            raise ConfigError("compare.target", self.target, "a finite number, or null")
        at_least("compare.tasks_stored", self.tasks_stored, 1)


@dataclass(kw_only=True)
class CompareRun:
    """lora compare: train several methods on the same data, order and budget, and put them side by side."""

    compare: CompareSpec = field(default_factory=CompareSpec)
    """What is trained side by side."""
    task: TaskSpec = field(default_factory=TaskSpec)
    """What is learnt."""
    model: ModelSpec = field(default_factory=ModelSpec)
    """The base model."""
    lora: LoraSpec = field(default_factory=LoraSpec)
    """The adapter of every method that has one."""
    train: TrainSpec = field(default_factory=TrainSpec)
    """The training of every method."""
    device: TrainDeviceSpec = field(default_factory=TrainDeviceSpec)
    """The machine."""

    def __post_init__(self) -> None:
        known_batch(self.train, "lora compare")
        metric = next(iter(self.task.metrics), "")
        if self.compare.target is not None and metric in TEXT_METRICS and self.train.metric not in TEXT_METRICS:
            needed = f"needs train.metric={metric}, without which nothing is written before the end"
            raise ConfigError("compare.target", self.compare.target, needed)


@dataclass(kw_only=True)
class BenchRun:
    """lora bench: several tasks on one frozen base, an adapter each, beside full fine-tuning."""

    tasks: list[str] = field(default_factory=lambda: ["sst2", "cola", "mrpc", "rte", "stsb", "qnli"])
    """Options of the group task, in the order of the table."""
    methods: list[str] = field(default_factory=lambda: ["full", "lora"])
    """Options of the group lora, in the order of the table; the others are compared with the first."""
    seeds: Any = 3
    """Each method is trained on each task once with each of these seeds; a number n: with 1 to n."""
    launcher: str = "isolated"
    """isolated: a process for each training; fused: the seeds of a method share one, and its base, where they can."""
    recipe: str | None = None
    """A recipe by name: its training of each of its tasks, or of `tasks`, beside its published figures; null: none."""
    task: TaskSpec = field(default_factory=TaskSpec)
    """Keys of every task, over what its file says."""
    model: ModelSpec = field(default_factory=ModelSpec)
    """The base model."""
    lora: LoraSpec = field(default_factory=LoraSpec)
    """The adapter of every method that has one."""
    train: TrainSpec = field(default_factory=TrainSpec)
    """The training of every method on every task."""
    device: DeviceSpec = field(default_factory=DeviceSpec)
    """The machine."""

    def __post_init__(self) -> None:
        plain_names("tasks", self.tasks, "sst2")
        plain_names("methods", self.methods, "dora")
        is_list = isinstance(self.seeds, list)
        if any(type(seed) is not int for seed in (self.seeds if is_list else [self.seeds])):
            raise ConfigError("seeds", self.seeds, "a whole number n, for seeds 1 to n, or a list such as [1,2,3]")
        if not is_list:
            at_least("seeds", self.seeds, 1)
        check_seeds("seeds", self.all_seeds)
        one_of("launcher", self.launcher, BENCH_LAUNCHERS, "launcher")

    @property
    def all_seeds(self) -> list[int]:
        """The seeds, one by one."""
        return self.seeds if isinstance(self.seeds, list) else list(range(1, self.seeds + 1))


@dataclass(kw_only=True)
class WhereSpec:
    """Which runs are listed."""

    task: str | None = None
    """Those of this task."""
    model: str | None = None
    """Those on this base model."""
    status: str | None = None
    """Those that are running, finished, failed, interrupted or pruned (stopped by a search)."""
    name: str | None = None
    """Those whose folder has this in its name, such as that of a sweep."""

    def __post_init__(self) -> None:
        if self.status is not None:
            one_of("where.status", self.status, (*STATUSES, "pruned"), "status")


@dataclass(kw_only=True)
class RunsRun:
    """lora runs: list the runs under runs/, newest first."""

    where: WhereSpec = field(default_factory=WhereSpec)
    """Which runs are listed."""
    sort: str = "started"
    """Newest first (started), best first (metric), fewest parameters first (parameters), quickest first (time)."""
    limit: int = 30
    """Runs shown; 0: all."""
    json: bool = False
    """One JSON object a line instead of a table; --json is the same."""

    def __post_init__(self) -> None:
        one_of("sort", self.sort, RUN_ORDERS, "order")
        at_least("limit", self.limit, 0)


@dataclass(kw_only=True)
class DiffRun:
    """lora diff: what two runs do not share: configuration, data, metrics, predictions."""

    run: str = "???"
    """Run folder, unique prefix of its name, or latest."""
    other: str = "???"
    """The run that it is put beside."""
    examples: int = 5
    """Rows shown that one gets right and the other wrong, or that differ."""

    def __post_init__(self) -> None:
        at_least("examples", self.examples, 0)


@dataclass(kw_only=True)
class ReportRun:
    """lora report: a run or a sweep as one HTML page that needs no network."""

    run: str | None = None
    """Run folder, unique prefix of its name, or latest."""
    sweep: str | None = None
    """Folder of a sweep; latest: the one that was started last."""
    output: str | None = None
    """HTML file to write; None: report.html in the folder."""
    examples: int = 20
    """Rows or written texts shown."""

    def __post_init__(self) -> None:
        if (self.run is None) == (self.sweep is None):
            raise ConfigError("run", self.run or "", "give run=FOLDER or sweep=FOLDER, one of them")
        at_least("examples", self.examples, 0)
