"""The configurations of a sweep, best first: what each reached over its seeds, what it cost, what can be believed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from lora_cli.errors import RunError
from lora_cli.runs.comparison import Spread
from lora_cli.runs.directory import RunDirectory, read_saved_config, write_csv, write_json
from lora_cli.runs.predictions import read_answers
from lora_cli.runs.statistics import RESAMPLED, Answers, interval, mcnemar, paired_bootstrap
from lora_cli.runs.sweep import TRAINED, SweepJob
from lora_cli.spec import LOSS_DOWNWARDS
from lora_cli.words import shortened

__all__ = ["ALPHA", "Board", "Configuration", "boards", "front", "write_leaderboard"]

ALPHA = 0.05
"""Below this p a difference counts as shown."""
_SAME_S, _SAME_SHARE = 1.0, 0.1
"""Training times that differ by less than so many seconds, or such a share, are the same to whoever chooses."""
_SEEDS = ("seed", "train.init_seed", "train.data_seed", "train.dropout_seed")
_HOW = re.compile(r"(tracker|sweep|resume)(\.|$)")
"""Keys that make no other configuration: the same folder may see them come and go."""
_COSTS = ("train_s", "rows_per_s", "peak_memory_mib")


@dataclass(frozen=True)
class _Run:
    """A finished job of a sweep."""

    keys: Mapping[str, str]
    seed: str
    path: str
    goal: tuple[str, str, str, str]
    """task, metric, split, fingerprint of the split's rows: what may be put side by side."""
    value: float | None
    costs: Mapping[str, float]
    answers: Answers | None


@dataclass(frozen=True)
class Configuration:
    """One configuration over its seeds."""

    keys: Mapping[str, str]
    """The keys that are not the same in all of the sweep, with their values, as they were typed."""
    seeds: tuple[str, ...]
    runs: tuple[str, ...]
    values: tuple[float, ...]
    """The metric of each seed that has one."""
    costs: Mapping[str, float]
    """Means over the seeds: trainable (parameters), adapter_bytes, train_s, rows_per_s, peak_memory_mib."""
    times: tuple[float, ...] = ()
    """Seconds that each seed trained."""
    p: float | None = None
    """Paired bootstrap against the best; None of the best itself, and where predictions cannot be drawn again."""
    p_mcnemar: float | None = None
    """McNemar against the best, on the first seed that both have; None where rows are neither right nor wrong."""
    same_answers: bool = False
    """It predicts what the best does, for every row and seed."""
    on_front: bool = False
    """No other is at least as good with as few parameters and as little time, and better in one of them."""

    @property
    def title(self) -> str:
        """Its keys and values; "" of the only configuration of a sweep over seeds."""
        return _title(self.keys)

    @property
    def mean(self) -> float | None:
        """Of the metric over the seeds."""
        return Spread(self.values).mean

    @property
    def stdev(self) -> float | None:
        """Standard deviation of the sample over the seeds; None of fewer than two."""
        return Spread(self.values).stdev

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's 95 % interval of the mean over seeds; None of fewer than two."""
        return interval(self.values)


@dataclass(frozen=True)
class Board:
    """Configurations of one task, scored by the same metric on the same rows, best first."""

    task: str
    metric: str
    split: str
    rows: Sequence[Configuration] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Titles of the rows for people: of what sets them apart, numbers to four digits or to as many as do."""
        first, *others = (row.keys for row in self.rows)
        shared = {key for key, value in first.items() if others and all(keys.get(key) == value for keys in others)}
        apart = [{key: value for key, value in row.keys.items() if key not in shared} for row in self.rows]
        for digits in (4, 8):
            found = [_title({key: shortened(value, digits) for key, value in keys.items()}) for keys in apart]
            if len(set(found)) == len(found):
                return found
        return [_title(keys) for keys in apart]

    @property
    def sentences(self) -> list[str]:
        """What the tests allow to say of the best beside each other one, in words."""
        (best, *others), (first, *names) = self.rows, self.names
        found = (_said(best, other, first, name) for other, name in zip(others, names, strict=True))
        return [said for said in found if said]


def boards(jobs: Sequence[SweepJob], warn: Callable[[str], None] | None = None) -> list[Board]:
    """A board for each task of a sweep, in the order of its jobs; a job whose run cannot be read counts as missing,
    and `warn` is told.
    """
    swept = _swept(jobs)
    runs: dict[tuple[str, str, str, str], list[_Run]] = {}
    for job, keys in zip(jobs, swept, strict=True):
        if job.run is not None and job.status in TRAINED:
            try:
                run = _read(Path(job.run), keys)
            except (RunError, KeyError, OSError) as error:
                if warn is not None:
                    why = f"has no {error}" if isinstance(error, KeyError) else str(error)
                    warn(f"job {job.number} is not on the leaderboard, its run {job.run} cannot be read: {why}")
            else:
                runs.setdefault(run.goal, []).append(run)
    return [_board(goal, found) for goal, found in runs.items()]


def write_leaderboard(folder: Path, found: Sequence[Board]) -> None:
    """leaderboard.json with everything, leaderboard.csv with a line a configuration."""
    tables: list[dict[str, Any]] = []
    flat: list[dict[str, Any]] = []
    for board in found:
        facts = {"task": board.task, "split": board.split, "metric": board.metric}
        rows = [_plain(row) for row in board.rows]
        tables.append({**facts, "configurations": rows, "sentences": board.sentences})
        flat += [{**facts, **_flat(row)} for row in rows]
    write_json(folder / "leaderboard.json", {"boards": tables})
    write_csv(folder / "leaderboard.csv", flat)


def _swept(jobs: Sequence[SweepJob]) -> list[dict[str, str]]:
    """For each job the overrides in which it differs from others, seeds apart."""
    parted = [dict(word.lstrip("+~").partition("=")[::2] for word in job.overrides) for job in jobs]
    keys = dict.fromkeys(key for words in parted for key in words if key not in _SEEDS and not _HOW.match(key))
    swept = [key for key in keys if len({words.get(key) for words in parted}) > 1]
    return [{key: words[key] for key in swept if key in words} for words in parted]


def _title(keys: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in keys.items())


def _read(path: Path, keys: Mapping[str, str]) -> _Run:
    run, config = RunDirectory(path), read_saved_config(path)
    facts = run.facts()
    metric, split = str(config["task"]["metrics"][0]), str(config["task"]["split"])
    costs = {name: float(facts["cost"][name]) for name in _COSTS}
    costs["trainable"] = float(facts["parameters"]["trainable"])
    costs["adapter_bytes"] = float(sum(file.stat().st_size for file in run.adapter.glob("*.safetensors")))
    goal = (str(config["task"]["name"]), metric, split, str(facts["data"][split]["fingerprint"]))
    own = {key: config["train"].get(key.removeprefix("train.")) for key in _SEEDS[1:]}
    seed = " ".join([str(config["seed"]), *(f"{key}={value}" for key, value in own.items() if value is not None)])
    answers = read_answers(run, split, facts["labels"]) if metric in RESAMPLED else None
    return _Run(keys, seed, str(path), goal, facts["metrics"][split].get(metric), costs, answers)


def _board(goal: tuple[str, str, str, str], runs: Sequence[_Run]) -> Board:
    task, metric, split, _ = goal
    titled: dict[str, dict[str, _Run]] = {}
    for run in runs:
        # The same configuration twice, as a search may try it, counts once.
        titled.setdefault(_title(run.keys), {}).setdefault(run.seed, run)
    downwards = metric in LOSS_DOWNWARDS
    rows = [_configuration(list(by_seed.values())) for by_seed in titled.values()]

    def rank(row: Configuration) -> tuple[bool, float, float]:
        mean = row.mean
        return (mean is None, 0.0 if mean is None else mean if downwards else -mean, row.costs["trainable"])

    rows.sort(key=rank)
    best, *others = rows
    tested = [_tested(metric, row, best, titled) for row in others]
    board = Board(task, metric, split, [best, *tested])
    starred = front(board)
    return dataclasses.replace(board, rows=[dataclasses.replace(row, on_front=row in starred) for row in board.rows])


def front(board: Board, costs: Collection[str] = ("trainable", "train_s")) -> list[Configuration]:
    """Pareto's front of the metric and `costs`: rows than which no other is at least as good and cheap, and better."""
    scored = [row for row in board.rows if row.mean is not None]
    sign = 1 if board.metric in LOSS_DOWNWARDS else -1
    return [row for row in scored if not any(_beats(other, row, sign, costs) for other in scored)]


def _configuration(runs: Sequence[_Run]) -> Configuration:
    costs = {name: fmean(run.costs[name] for run in runs) for name in runs[0].costs}
    values = tuple(run.value for run in runs if run.value is not None)
    seeds, paths = tuple(run.seed for run in runs), tuple(run.path for run in runs)
    return Configuration(runs[0].keys, seeds, paths, values, costs, tuple(run.costs["train_s"] for run in runs))


def _tested(
    metric: str, row: Configuration, best: Configuration, titled: Mapping[str, Mapping[str, _Run]]
) -> Configuration:
    """`row` with its tests against the best."""
    ours, theirs = titled[row.title], titled[best.title]
    shared = [seed for seed in ours if seed in theirs]
    paired = bool(shared) and len(shared) == len(ours) == len(theirs)
    order = shared if paired else list(ours)
    mine = [ours[seed].answers for seed in order]
    other = [theirs[seed].answers for seed in (shared if paired else theirs)]
    known_mine = [answers for answers in mine if answers is not None]
    known_other = [answers for answers in other if answers is not None]
    if len(known_mine) < len(mine) or len(known_other) < len(other) or not row.values or not best.values:
        return row
    p_mcnemar = None
    if metric in ("accuracy", "f1", "macro_f1", "matthews"):
        first = ours[shared[0]].answers if shared else known_mine[0]
        against = theirs[shared[0]].answers if shared else known_other[0]
        assert first is not None
        assert against is not None
        p_mcnemar = mcnemar(first, against)
    p = paired_bootstrap(metric, known_mine, known_other, paired=paired)
    same = paired and all(
        np.array_equal(one.predictions, two.predictions) for one, two in zip(known_mine, known_other, strict=True)
    )
    return dataclasses.replace(row, p=p, p_mcnemar=p_mcnemar, same_answers=same)


def _beats(other: Configuration, row: Configuration, sign: int, costs: Collection[str]) -> bool:
    """Whether `other` is nowhere behind `row`, and ahead somewhere: in the metric (times `sign`) or one of `costs`."""
    assert other.mean is not None
    assert row.mean is not None
    ahead = [sign * (row.mean - other.mean)]
    for name in costs:
        saved = row.costs[name] - other.costs[name]
        ahead.append(0.0 if name == "train_s" and abs(saved) <= _noise(row, other) else saved)
    return min(ahead) >= 0 and max(ahead) > 0


def _noise(one: Configuration, two: Configuration) -> float:
    """Seconds by which two training times may differ and tell nothing."""
    longest = max(one.costs["train_s"], two.costs["train_s"])
    return max(_SAME_S, _SAME_SHARE * longest, *(Spread(row.times).stdev or 0.0 for row in (one, two)))


def _said(best: Configuration, other: Configuration, first: str, name: str) -> str | None:
    """What can be said of `other`, called `name`, beside the best, called `first`."""
    if other.p is None or best.mean is None or other.mean is None:
        return None
    if other.same_answers:
        # And as the smaller is the first of two that are as good, nothing is to be said of sizes.
        return f"{name} gives the same predictions as {first} on every row"
    shown = f"p = {other.p:.2g}" if other.p >= 0.001 else "p < 0.001"
    if other.p < ALPHA:
        return f"{name} is worse than {first} ({shown})"
    said = f"{name} is not significantly worse than {first} ({shown})"
    ratio = best.costs["trainable"] / max(other.costs["trainable"], 1)
    return f"{said} and {ratio:.2g}× smaller" if ratio >= 1.5 else said


def _plain(row: Configuration) -> dict[str, Any]:
    return {
        "title": row.title,
        **dataclasses.asdict(row),
        "mean": row.mean,
        "stdev": row.stdev,
        "interval": row.interval,
    }


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the csv: no lists."""
    low, high = row["interval"] or (None, None)
    names = ("title", "mean", "stdev", "p", "p_mcnemar", "on_front")
    return {
        **{name: row[name] for name in names},
        "low": low,
        "high": high,
        "seeds": len(row["values"]),
        **row["costs"],
        "runs": " ".join(row["runs"]),
    }
