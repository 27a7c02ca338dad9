"""What repeated measurements come to: medians, ratios with the spread of the pairs, tables. Only arithmetic."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

__all__ = [
    "MEASURES",
    "Measure",
    "Ratio",
    "Repeat",
    "aligned",
    "markdown",
    "medians",
    "ratio",
    "replaced",
    "summary",
    "table",
]

Repeat = Mapping[str, Mapping[str, float]]
"""One turn of all sides: side → measure → value."""
Pair = tuple[str, str]
"""(side, the side it is divided by)."""


@dataclass(frozen=True)
class Measure:
    """A column. `is_compared` off: shown so that a reader sees that both did the same work; no ratio."""

    key: str
    name: str
    digits: int
    is_compared: bool = True


@dataclass(frozen=True)
class Ratio:
    """Ratio of the medians, and the least and largest ratio of one turn's pair."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}–{self.high:.2f})"


MEASURES = (
    Measure("rows_per_s", "train rows/s", 1),
    Measure("eval_rows_per_s", "eval rows/s", 1),
    Measure("tokens_per_s", "tokens/s", 0),
    Measure("gflop_per_s", "GFLOP/s", 1),
    Measure("wall_s", "wall s", 1),
    Measure("peak_rss_mib", "MiB", 0),
    Measure("first_step_s", "first step s", 1),
    Measure("train_loss", "train loss", 4, is_compared=False),
    Measure("score", "score", 4, is_compared=False),
    Measure("tokens", "tokens", 0, is_compared=False),
)


def medians(repeats: Sequence[Repeat], side: str) -> dict[str, float]:
    """The median of each measure of a side."""
    return {key: median(repeat[side][key] for repeat in repeats) for key in repeats[0][side]}


def ratio(repeats: Sequence[Repeat], key: str, pair: Pair) -> Ratio:
    """How many times the second side's value the first one's is."""
    over, under = ([repeat[side][key] for repeat in repeats] for side in pair)
    each = [a / b for a, b in zip(over, under, strict=True)]
    return Ratio(median(over) / median(under), min(each), max(each))


def summary(repeats: Sequence[Repeat], pairs: Sequence[Pair]) -> dict[str, object]:
    """Medians of each side and ratios of each pair, to be written as JSON."""
    return {
        "medians": {side: medians(repeats, side) for side in repeats[0]},
        "ratios": {
            " / ".join(pair): {
                measure.key: vars(ratio(repeats, measure.key, pair)) for measure in _compared(repeats, pair)
            }
            for pair in pairs
        },
    }


def table(repeats: Sequence[Repeat], pairs: Sequence[Pair]) -> list[list[str]]:
    """Cells: a line of names, one for each side with its medians, one for each pair with its ratios."""
    shown = [measure for measure in MEASURES if any(measure.key in side for side in repeats[0].values())]
    lines = [["", *(measure.name for measure in shown)]]
    for side in repeats[0]:
        found = medians(repeats, side)
        cells = (f"{found[measure.key]:,.{measure.digits}f}" if measure.key in found else "" for measure in shown)
        lines.append([side, *cells])
    for pair in pairs:
        compared = _compared(repeats, pair)
        cells = (str(ratio(repeats, measure.key, pair)) if measure in compared else "" for measure in shown)
        lines.append([" / ".join(pair), *cells])
    return lines


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells as text, columns flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Cells as a table of Markdown, all but the first column flush right."""
    first, *rest = lines
    rule = ["---", *["---:"] * (len(first) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [first, rule, *rest])


def replaced(text: str, name: str, block: str) -> str:
    """A page's text with what stands between its marks of `name` made anew."""
    marks = re.compile(rf"(<!-- {name}: begin.*?-->\n).*?(<!-- {name}: end -->)", re.DOTALL)
    return marks.sub(lambda found: f"{found[1]}\n{block}\n\n{found[2]}", text)


def _compared(repeats: Sequence[Repeat], pair: Pair) -> list[Measure]:
    """Measures that both sides of a pair have."""
    sides = [repeats[0][side] for side in pair]
    return [measure for measure in MEASURES if measure.is_compared and all(measure.key in side for side in sides)]
