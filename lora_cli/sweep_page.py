"""A sweep as an HTML page: its leaderboard, the metric against costs and keys, its runs, what did not finish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from math import prod
from pathlib import Path
from statistics import fmean
from typing import Any

from lora_cli import page
from lora_cli.axis import as_number
from lora_cli.comparison_view import chance, seconds, size
from lora_cli.errors import RunError
from lora_cli.page import Html
from lora_cli.parallel_plot import parallel_plot
from lora_cli.runs.difference import read_metrics, series
from lora_cli.runs.directory import RunDirectory
from lora_cli.runs.leaderboard import Board, Configuration, front
from lora_cli.runs.sweep import DONE, TRAINED, SweepJob, read_command
from lora_cli.screen import significant
from lora_cli.spec import LOSS_DOWNWARDS
from lora_cli.words import shortened
from lora_cli.xy_plot import xy_plot

__all__ = ["sweep_page"]

_MAX_AXES = 3
"""Swept keys of which every two make a heat map."""
_MAX_CURVES = 40
_MAX_LINES = 300
_HEADS = ("configuration", "", "95 % interval", "seeds", "p", "McNemar", "trains", "on disk", "memory", "time")

Facts = Mapping[str, Any]


def sweep_page(folder: Path, jobs: Sequence[SweepJob], found: Sequence[Board]) -> str:
    """The page of the sweep in `folder`, with what has finished of its `jobs`, and their boards."""
    done = sum(job.status in TRAINED for job in jobs)
    told = {path: _facts(path) for board in found for row in board.rows for path in row.runs}
    models = dict.fromkeys(str(facts["base"]["name"]) for facts in told.values() if "base" in facts)
    about = [folder.name, *([", ".join(models)] if models else []), f"{done} of {len(jobs)} jobs finished"]
    parts = [page.paragraph(" · ".join(about), quiet=True)]
    for board in found:
        parts += _board(board, told)
    if missing := [job for job in jobs if job.status not in DONE]:
        parts.append(page.section("Not finished", _missing(missing)))
    words = read_command(folder)
    if words:
        what = page.paragraph("The same command leaves what is finished alone and trains the rest.", quiet=True)
        parts.append(page.section("Made by", page.command(words), what))
    return page.document(f"Sweep over {_axes_named(found)}", parts)


def _facts(path: str) -> Facts:
    """run.json of a run; nothing if it has become unreadable."""
    with suppress(RunError):
        return RunDirectory(Path(path)).facts()
    return {}


def _board(board: Board, told: Mapping[str, Facts]) -> list[Html]:
    figure = f"{board.split}/{board.metric}"
    names = [name or "as it is" for name in board.names]
    rows = [_row(row, name, first=row is board.rows[0]) for row, name in zip(board.rows, names, strict=True)]
    table = page.table([head or board.metric for head in _HEADS], rows, best=True)
    notes = [page.paragraph(note, quiet=True) for note in _notes(board)]
    parts = [page.section(f"{board.task}: {figure}", table, *notes, *map(page.paragraph, board.sentences))]
    parts += _against(board, names, figure, "trainable", "parameters that train", log=True)
    parts += _against(board, names, figure, "train_s", "training time, s", log=False)
    parts += _by_keys(board, names, figure)
    parts += _curves(board, names, told)
    parts.append(_runs(board, names, told))
    return parts


def _row(row: Configuration, name: str, *, first: bool) -> list[object]:
    low, high = row.interval or (None, None)
    costs = row.costs
    return [
        f"{name}\u00a0*" if row.on_front else name,
        significant(row.mean, 4),
        "–" if low is None else f"{significant(low, 4)} to {significant(high, 4)}",
        len(row.values),
        "" if first else chance(row.p),
        "" if first else chance(row.p_mcnemar),
        f"{costs['trainable']:,.0f}",
        size(costs["adapter_bytes"]),
        size(costs["peak_memory_mib"] * 2**20),
        seconds(costs["train_s"]),
    ]


def _notes(board: Board) -> list[str]:
    """What the columns and the star mean."""
    said = ["p: paired bootstrap over rows and seeds against the first."]
    if any(row.p_mcnemar is not None for row in board.rows):
        other = "" if board.metric == "accuracy" else f"; it tests accuracy, not {board.metric}"
        said.append(f"McNemar: exact test, of the first seed that both have, on rows that only one gets right{other}.")
    return [*said, "* no other is as good, as small and as fast (times that are about equal count as equal)."]


def _against(board: Board, names: Sequence[str], figure: str, cost: str, label: str, *, log: bool) -> list[Html]:
    """The metric against a cost, unless that is the same for all."""
    known = [(row, name) for row, name in zip(board.rows, names, strict=True) if row.mean is not None]
    points = {name: [(row.costs[cost], row.mean)] for row, name in known if row.mean is not None}
    if len({point for ((point, _),) in points.values()}) < 2:
        return []
    bars = {name: (min(row.values), max(row.values)) for row, name in known if len(set(row.values)) > 1}
    best = sorted({(row.costs[cost], row.mean) for row in front(board, [cost]) if row.mean is not None})
    plot = xy_plot(points, x_label=label, y_label=figure, dots=True, log_x=log, bars=bars, front=best)
    said = [
        *(["Bars: least to largest over seeds."] if bars else []),
        *(["Dotted: the Pareto front."] * (len(best) > 1)),
    ]
    note = [page.paragraph(" ".join(said), quiet=True)] if said else []
    return [page.section(f"{figure} against {label}", Html(plot), *note)]


def _by_keys(board: Board, names: Sequence[str], figure: str) -> list[Html]:
    """The metric by the swept keys: a heat map for every two, or where most cells were empty one plot of all."""
    keys = dict.fromkeys(key for row in board.rows for key in row.keys)
    values = {key: {_value(row, key) for row in board.rows} for key in keys}
    axes = [key for key in keys if len(values[key]) > 1]
    if len(axes) < 2:
        return []
    if len(axes) <= _MAX_AXES and 2 * len(board.rows) >= prod(len(values[key]) for key in axes):
        return [part for down, across in combinations(axes, 2) for part in _heat_map(board, figure, axes, down, across)]
    lines = {
        name: [*(_value(row, key) for key in axes), str(row.mean)]
        for row, name in list(zip(board.rows, names, strict=True))[:_MAX_LINES]
        if row.mean is not None
    }
    if len(lines) < 2:
        return []
    note = page.paragraph("A line a configuration; the better, the stronger its colour.", quiet=True)
    return [page.section(f"{figure} by {', '.join(axes)}", Html(parallel_plot([*axes, figure], lines)), note)]


def _heat_map(board: Board, figure: str, axes: Sequence[str], down: str, across: str) -> list[Html]:
    """The mean metric of each pair of values over those of the other keys that every pair has."""
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for row in board.rows:
        if row.mean is not None:
            others = " ".join(f"{key}={_value(row, key)}" for key in axes if key not in (down, across))
            cells.setdefault((_value(row, down), _value(row, across)), {})[others] = row.mean
    shared = set.intersection(*map(set, cells.values())) if len(cells) > 1 else set()
    if not shared:
        return []
    means = {pair: fmean(found[others] for others in shared) for pair, found in cells.items()}
    least, most = min(means.values()), max(means.values())
    downs, acrosses = (sorted({pair[place] for pair in means}, key=_order) for place in (0, 1))
    table = []
    for value in downs:
        line = [("–", 0.0)] * len(acrosses)
        for place, other in enumerate(acrosses):
            if (mean := means.get((value, other))) is not None:
                line[place] = (significant(mean, 4), _strength(mean, least, most, board.metric))
        table.append((f"{down}={shortened(value)}", line))
    parts = [page.heat_map(["", *(f"{across}={shortened(value)}" for value in acrosses)], table)]
    if any(found.keys() != shared for found in cells.values()):
        said = f"Means of what every cell has: {', '.join(sorted(shared))}."
        parts.append(page.paragraph(said, quiet=True))
    return [page.section(f"{figure} by {down} and {across}", *parts)]


def _value(row: Configuration, key: str) -> str:
    return row.keys.get(key, "–")


def _order(value: str) -> tuple[bool, float, str]:
    """Numbers by their size, then names."""
    number = as_number(value)
    return number is None, number or 0.0, value


def _strength(value: float, least: float, most: float, metric: str) -> float:
    share = (value - least) / (most - least) if most > least else 1.0
    return 1 - share if metric in LOSS_DOWNWARDS else share


def _curves(board: Board, names: Sequence[str], told: Mapping[str, Facts]) -> list[Html]:
    shown = list(zip(board.rows, names, strict=True))[:_MAX_CURVES]
    curves = {name: _mean_curve(row, board.metric) for row, name in shown}
    if not any(curves.values()):
        return []
    plot = Html(xy_plot(curves, x_label="step", y_label=f"validation/{board.metric}"))
    known = [told[path] for row, _ in shown for path in row.runs]
    note = page.paragraph("The table has each run at its best step, a curve goes on to the last.", quiet=True)
    early = any(facts.get("best_step") not in (None, facts.get("steps")) for facts in known)
    return [page.section("While they trained (mean over seeds)", plot, *([note] if early else []))]


def _mean_curve(row: Configuration, metric: str) -> list[tuple[float, float]]:
    found: dict[float, list[float]] = {}
    for path in row.runs:
        with suppress(RunError):
            for step, value in series(read_metrics(Path(path)), f"validation/{metric}"):
                found.setdefault(step, []).append(value)
    return [(step, fmean(values)) for step, values in sorted(found.items())]


def _runs(board: Board, names: Sequence[str], told: Mapping[str, Facts]) -> Html:
    """Every run that counts, folded away."""
    rows = []
    for row, name in zip(board.rows, names, strict=True):
        for seed, path in zip(row.seeds, row.runs, strict=True):
            value = told[path].get("metrics", {}).get(board.split, {}).get(board.metric)
            rows.append((name, seed, significant(value, 4), path, told[path].get("started", "")))
    heads = ("configuration", "seed", board.metric, "run", "started")
    return page.section(f"{len(rows)} runs", page.table(heads, rows, numbers=False), folded=True)


def _missing(jobs: Sequence[SweepJob]) -> Html:
    rows = [(job.number, " ".join(job.overrides), job.status, job.error or "") for job in jobs]
    return page.table(["job", "configuration", "status", "why"], rows, numbers=False)


def _axes_named(found: Sequence[Board]) -> str:
    keys = list(dict.fromkeys(key for board in found for row in board.rows for key in row.keys))
    return ", ".join(keys) or "seeds"
