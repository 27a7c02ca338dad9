"""Comparisons as tables on the terminal and as a plot. Knows rich and figures; no run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from lora_cli.dot_plot import Panel, dot_plot
from lora_cli.runs.comparison import Goal, Spread
from lora_cli.screen import count, duration, significant

if TYPE_CHECKING:
    from lora_cli.engine.memory import Footprint

__all__ = ["chance", "legend", "plot", "results_view", "seconds", "size", "sizes_view"]

Spreads = Mapping[str, Mapping[str, Spread]]
"""Method → figure → its spread over the seeds."""

_NOTHING = Spread(())

_COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("trains", "trainable_parameters", count),
    ("on disk", "adapter_bytes", lambda value: size(value)),
    ("memory", "peak_memory_mib", lambda value: size(value * 2**20)),
    ("time", "train_s", lambda value: seconds(value)),
    ("rows/s", "rows_per_s", count),
)
"""Columns: head, figure, how its median is shown."""


def results_view(goal: Goal, found: Spreads, seeds: int) -> Table:
    """What each method reached and cost, in the order given."""
    reaching = [] if goal.target is None else [f"to {goal.target:g}"]
    table = _table(goal.metric, *(head for head, _, _ in _COSTS), *reaching)
    for method, figures in found.items():
        done = len(figures.get("steps", _NOTHING).values)
        name = method if done == seeds else f"{method} ({done} of {seeds} seeds)"
        cells = [_metric(figures.get(goal.figure, _NOTHING))]
        cells += [_median(figures.get(figure, _NOTHING), shown) for _, figure, shown in _COSTS]
        if reaching:
            cells.append(_reached(figures, done))
        table.add_row(escape(name), *cells)
    return table


def legend(goal: Goal, seeds: int) -> str:
    """What the numbers of the table are."""
    if seeds == 1:
        return f"{goal.figure}; memory is the peak of the process"
    return f"{goal.figure} over {seeds} seeds: mean ± standard deviation; of the rest, medians"


def sizes_view(found: Mapping[str, Footprint], tasks: int) -> Table:
    """What each method holds in memory, and on disk for one task and for `tasks`."""
    table = _table("trains", "weights", "gradients", "AdamW", "in memory", "a task", f"{tasks} tasks")
    for method, each in found.items():
        parts = (each.weight_bytes, each.gradient_bytes, each.optimizer_bytes, each.memory_bytes, each.task_bytes)
        cells = map(size, (*parts, each.storage_bytes(tasks)))
        table.add_row(escape(method), count(each.trainable_parameters), *cells)
    return table


def plot(title: str, goal: Goal, found: Spreads) -> str:
    """An SVG: the metric beside what it costs, a dot a seed."""

    def values(figure: str, factor: float = 1) -> dict[str, Sequence[float]]:
        return {
            method: [factor * value for value in figures[figure].values]
            for method, figures in found.items()
            if figure in figures
        }

    panels = [
        Panel(goal.figure, values(goal.figure), significant, "near", fmean),
        Panel("parameters that train", values("trainable_parameters"), count, "log"),
        Panel("peak memory", values("peak_memory_mib", 2**20), size),
        Panel("training time", values("train_s"), seconds),
    ]
    return dot_plot(title, list(found), panels)


def seconds(value: float) -> str:
    """A time: 1.4s, 3m20s."""
    return f"{value:.1f}s" if value < 10 else duration(value)


def chance(p: float | None) -> str:
    """A p value: 0.37, 0.009, <0.001."""
    return "–" if p is None else "<0.001" if p < 0.001 else f"{p:.2g}"


def size(num_bytes: float) -> str:
    """Bytes to three digits: 86.7 MiB."""
    units = iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while num_bytes >= 999.5 and unit != "TiB":
        num_bytes, unit = num_bytes / 1024, next(units)
    return f"{num_bytes:.3g} {unit}"


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("method")
    for head in heads:
        table.add_column(escape(head), justify="right")
    return table


def _metric(spread: Spread) -> str:
    deviation = "" if spread.stdev is None else f" ± {significant(spread.stdev)}"
    return f"{significant(spread.mean)}{deviation}"


def _median(spread: Spread, shown: Callable[[float], str]) -> str:
    return "–" if spread.median is None else shown(spread.median)


def _reached(figures: Mapping[str, Spread], trained: int) -> str:
    """When the target was reached; if not by all, by how many: a median of the others would flatter."""
    steps, times = (figures.get(name, _NOTHING) for name in ("steps_to_target", "train_s_to_target"))
    if steps.median is None or times.median is None:
        return "never"
    if len(steps.values) < trained:
        return f"{len(steps.values)} of {trained} seeds"
    return f"{steps.median:.0f} steps, {seconds(times.median)}"
