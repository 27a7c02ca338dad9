"""Parallel coordinates as SVG, in the colours of the page around it: an upright axis a column, a line a row.

Knows numbers and names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from lora_cli.axis import as_number, axis_of, rounded
from lora_cli.errors import printable

__all__ = ["parallel_plot"]

_WIDTH, _HEIGHT, _COLUMN = 640, 320, 110
"""Of the picture, and the least between two axes."""
_SIDE, _TOP, _BOTTOM = 60, 34, 20
_MAX_NAME = 20
_MAX_VALUES, _LINE = 6, 14
"""So few numbers are themselves what is written beside their axis; and how far apart lines of text are."""
_DECADE = 10
"""Numbers above 0 whose largest is more than so many times the least get equal steps for equal ratios."""


def parallel_plot(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """An <svg> that scrolls: for each of `rows`, best first, a line through its values, the stronger the better.

    A column of numbers is an axis of numbers, any other has a point for each name.
    """
    width = max(_WIDTH, 2 * _SIDE + _COLUMN * (len(columns) - 1))
    lefts = [round(_SIDE + (width - 2 * _SIDE) * place / max(len(columns) - 1, 1), 1) for place in range(len(columns))]
    body, heights = [], []
    for place, (name, left) in enumerate(zip(columns, lefts, strict=True)):
        found, ticks = _column([values[place] for values in rows.values()])
        heights.append(found)
        body.append(_axis(name, left, ticks))
    lines = []
    for rank, (title, values) in enumerate(rows.items()):
        places = [f"{left},{found[value]}" for left, found, value in zip(lefts, heights, values, strict=True)]
        strength = 100 - round(80 * rank / max(len(rows) - 1, 1))
        style = f"stroke: color-mix(in srgb, var(--c0) {strength}%, var(--line))"
        best = ' class="best"' if rank == 0 else ""
        told = f"<title>{escape(printable(title, 120))}</title>"
        lines.append(f'<polyline{best} style="{style}" points="{" ".join(places)}">{told}</polyline>')
    # The best is drawn last, over all others, and the names of values over the lines.
    inside = "".join([*reversed(lines), *body])
    size = f'viewBox="0 0 {width} {_HEIGHT}" style="min-width: {width}px"'
    return f'<div class="scroll plot"><svg {size} role="img">{inside}</svg></div>'


def _column(values: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Where each of `values` lies, and where what is written beside the axis does."""
    numbers = [number for value in values if (number := as_number(value)) is not None]
    if len(numbers) < len(values):
        names = sorted(set(values))
        found = {name: _height((place + 0.5) / len(names)) for place, name in enumerate(names)}
        return found, {printable(name, _MAX_NAME): height for name, height in found.items()}
    log = min(numbers) > 0 and max(numbers) > _DECADE * min(numbers)
    axis = axis_of(numbers, log=log)
    found = {value: _height(axis.share(number)) for value, number in zip(values, numbers, strict=True)}
    shown: dict[str, float] = {}
    for tick in sorted(set(numbers)) if len(set(numbers)) <= _MAX_VALUES else axis.ticks:
        height = _height(axis.share(tick))
        if all(abs(height - other) >= _LINE for other in shown.values()):
            shown[rounded(tick)] = height
    return found, shown


def _height(share: float) -> float:
    return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)


def _axis(name: str, left: float, ticks: Mapping[str, float]) -> str:
    shown = escape(name if len(name) <= _MAX_NAME else f"…{name[1 - _MAX_NAME :]}")
    parts = [
        f'<text x="{left}" y="16" text-anchor="middle">{shown}</text>',
        f'<line class="upright" x1="{left}" x2="{left}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>',
        *(f'<text class="tick halo" x="{left + 6}" y="{y + 4:.1f}">{escape(tick)}</text>' for tick, y in ticks.items()),
    ]
    return "".join(parts)
