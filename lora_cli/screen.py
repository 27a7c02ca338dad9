"""What a person sees while a command runs: progress on stderr, results on stdout.

A live bar on a terminal, plain aligned lines elsewhere. Knows numbers and names, not models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lora_cli.errors import printable

__all__ = ["Screen", "count", "duration", "significant"]


_MAX_COLUMNS = 5
"""Metrics beside each other in a table of results; what is wider than a terminal gets cut."""


class Screen:
    """The terminal of one command, or the `file` to which all that it says goes."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._out = Console(file=file, highlight=False, soft_wrap=True)
        self._err = Console(file=file, stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._live: Live | None = None

    def fact(self, name: str, text: str) -> None:
        """One line of the header: what was understood."""
        self._err.print(f"[bold cyan]{name:10}[/] {escape(printable(text, 400))}")

    def warning(self, text: str) -> None:
        """Something to know that stops nothing."""
        self._err.print(f"[yellow]warning[/]    {escape(printable(text, 400))}")

    def targets(self, rows: Sequence[tuple[str, int, str, int]]) -> None:
        """What is adapted: (layers, how many, rank, trained parameters)."""
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
        for name, justify in (("trains", "left"), ("layers", "right"), ("rank", "right"), ("parameters", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for pattern, layers, rank, parameters in rows:
            table.add_row(escape(printable(pattern, 60)), str(layers), rank, f"{parameters:,}")
        self._err.print(table)

    def step(
        self, step: int, total: int, loss: float, lr: float, rows_per_s: float, tokens_per_s: float, eta: float
    ) -> None:
        """Where the training stands."""
        fields = (
            f"loss {significant(loss):>7}   lr {lr:.1e}   {count(rows_per_s):>5} rows/s   "
            f"{count(tokens_per_s):>5} tokens/s   eta {duration(eta)}"
        )
        if not self._err.is_terminal:
            width = len(str(total))
            self._err.print(f"step {step:>{width}}/{total}   {fields}")
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("step {task.completed:>5.0f}/{task.total:.0f}"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                console=self._err,
                refresh_per_second=4,
            )
            self._bar.start()
            self._bar.add_task(fields, total=total)
        self._bar.update(self._bar.task_ids[0], completed=step, description=fields)

    def scored(self, step: int, metrics: Mapping[str, float | None], *, best: bool) -> None:
        """One scoring of the validation split."""
        values = "   ".join(f"{name} {significant(value)}" for name, value in metrics.items())
        self._err.print(f"[green]step {step:>5}[/]   {escape(values)}{'   (best so far)' if best else ''}")

    def counter(self, what: str) -> Callable[[int, int], None]:
        """A live count of what is done so far, on a terminal only."""

        def count_up(done: int, total: int) -> None:
            if not self._err.is_terminal:
                return
            if self._bar is None:
                self._bar = Progress(
                    TextColumn(f"{escape(what)} {{task.completed:>5.0f}}/{{task.total:.0f}}"),
                    BarColumn(bar_width=24),
                    TextColumn("eta"),
                    TimeRemainingColumn(compact=True),
                    console=self._err,
                    transient=True,
                )
                self._bar.start()
                self._bar.add_task("", total=total)
            self._bar.update(self._bar.task_ids[0], completed=done)
            if done == total:
                self.close()

        return count_up

    def running(self, lines: Sequence[str]) -> None:
        """What runs right now, a line each, below everything else; on a terminal only. None: nothing does."""
        if self._live is None and lines and self._err.is_terminal:
            self._live = Live(console=self._err, transient=True, auto_refresh=False)
            self._live.start()
        if self._live is not None:
            text = Text("\n".join(printable(line, self.width - 1) for line in lines), style="dim")
            self._live.update(text, refresh=True)
            if not lines:
                self._live.stop()
                self._live = None

    def close(self) -> None:
        """Take the live bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def results(self, splits: Mapping[str, Mapping[str, float | None]]) -> None:
        """The final table: a line a split and a column a metric, or turned around where that would be too wide."""
        names = list(dict.fromkeys(name for metrics in splits.values() for name in metrics))
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
        if len(names) <= _MAX_COLUMNS:
            table.add_column("split")
            for name in names:
                table.add_column(escape(name), justify="right")
            for split, metrics in splits.items():
                table.add_row(escape(split), *(significant(metrics.get(name), 4) for name in names))
        else:
            table.add_column("metric")
            for split in splits:
                table.add_column(escape(split), justify="right")
            for name in names:
                table.add_row(escape(name), *(significant(metrics.get(name), 4) for metrics in splits.values()))
        self._out.print(table)

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        return self._out.width

    def show(self, *views: RenderableType) -> None:
        """Views on stdout, each as wide as the terminal, with a blank line before it."""
        for view in views:
            self._out.print()
            self._out.print(view, soft_wrap=False)

    def note(self, view: RenderableType) -> None:
        """A view on stderr, as wide as the terminal."""
        self._err.print(view, soft_wrap=False)

    @property
    def can_sketch(self) -> bool:
        """Whether stderr is a terminal that can show plots of characters."""
        return self._err.is_terminal and self._err.encoding.startswith("utf")

    def sketch(self, text: str) -> None:
        """A plot of characters on stderr."""
        self._err.print(escape(text))

    def line(self, text: str) -> None:
        """Lines of result on stdout."""
        for line in text.splitlines():
            self._out.print(escape(printable(line, 1000)))


def significant(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, at least as many decimals below 1; an undefined one as a dash."""
    if value is None:
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}g}"


def count(value: float) -> str:
    """1840 → 1.84k, three significant digits."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """101 → 1m41s."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
