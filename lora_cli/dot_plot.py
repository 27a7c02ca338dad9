"""Small multiples as SVG, for light and dark pages: a row a name, a panel a figure, a dot a value. Knows numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

from lora_cli.errors import printable

__all__ = ["Panel", "dot_plot"]

_NAMES, _PANEL, _GAP, _VALUE = 110, 110, 24, 62
"""Widths of the names, of a panel's dots, between panels, and of the value beside the dots."""
_TOP, _ROW, _BOTTOM, _MARGIN = 76, 30, 30, 20
_STYLE = """\
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
.title { font-size: 15px; font-weight: 600; }
.head { font-weight: 600; }
.quiet { font-size: 11px; fill: #59636e; }
.paper { fill: #ffffff; }
.line { stroke: #d1d9e0; stroke-width: 1; }
.middle { stroke: #0969da; stroke-width: 2.5; stroke-linecap: round; }
.dot { fill: #0969da; fill-opacity: 0.45; }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc; }
  .quiet { fill: #9198a1; }
  .paper { fill: #0d1117; }
  .line { stroke: #3d444d; }
  .middle { stroke: #58a6ff; }
  .dot { fill: #58a6ff; }
}"""


@dataclass(frozen=True)
class Panel:
    """One figure of every row."""

    title: str
    values: Mapping[str, Sequence[float]]
    """Row → its values; none is an empty row."""
    shown: Callable[[float], str]
    """A number as text."""
    axis: str = "zero"
    """Where the axis begins: at zero; near the least value (near); or (log) it has equal steps for equal ratios."""
    middle: Callable[[Sequence[float]], float] = median
    """What a row's bar and number stand for."""


def dot_plot(title: str, rows: Sequence[str], panels: Sequence[Panel]) -> str:
    """An SVG of `rows` in this order: for each panel a dot a value, and their middle as a bar and as text."""
    width = 2 * _MARGIN + _NAMES + len(panels) * (_PANEL + _VALUE + _GAP) - _GAP
    height = _TOP + len(rows) * _ROW + _BOTTOM
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{_text(title)}</title>",
        f"<style>\n{_STYLE}\n</style>",
        f'<rect class="paper" width="{width}" height="{height}" rx="6"/>',
        f'<text class="title" x="{_MARGIN}" y="30">{_text(title)}</text>',
        *(f'<text x="{_MARGIN}" y="{_middle(row) + 4}">{_text(name, 15)}</text>' for row, name in enumerate(rows)),
    ]
    for number, panel in enumerate(panels):
        lines += _panel(panel, rows, _MARGIN + _NAMES + number * (_PANEL + _VALUE + _GAP))
    return "\n".join([*lines, "</svg>\n"])


def _panel(panel: Panel, rows: Sequence[str], left: int) -> Iterator[str]:
    yield f'<text class="head" x="{left}" y="{_TOP - 20}">{_text(panel.title, 24)}</text>'
    everything = [value for row in rows for value in panel.values.get(row, ())]
    if not everything:
        return
    least, most = _limits(everything, panel.axis)
    bottom = _TOP + len(rows) * _ROW
    for value, anchor, x in ((least, "start", left), (most, "end", left + _PANEL)):
        yield f'<line class="line" x1="{x}" y1="{_TOP - 6}" x2="{x}" y2="{bottom}"/>'
        yield f'<text class="quiet" x="{x}" y="{bottom + 16}" text-anchor="{anchor}">{_text(panel.shown(value))}</text>'
    for number, row in enumerate(rows):
        y, values = _middle(number), panel.values.get(row, ())
        yield f'<line class="line" x1="{left}" y1="{y}" x2="{left + _PANEL}" y2="{y}"/>'
        places = [left + _PANEL * _share(value, least, most, panel.axis) for value in values]
        yield from (f'<circle class="dot" cx="{place:.1f}" cy="{y}" r="4.5"/>' for place in places)
        if values:
            middle = panel.middle(values)
            place = left + _PANEL * _share(middle, least, most, panel.axis)
            yield f'<line class="middle" x1="{place:.1f}" y1="{y - 8}" x2="{place:.1f}" y2="{y + 8}"/>'
            yield f'<text x="{left + _PANEL + 10}" y="{y + 4}">{_text(panel.shown(middle))}</text>'


def _middle(row: int) -> int:
    return _TOP + row * _ROW + _ROW // 2


def _limits(values: Sequence[float], axis: str) -> tuple[float, float]:
    """Ends of an axis for `values`."""
    least, most = min(values), max(values)
    if axis == "log":
        return 10.0 ** math.floor(math.log10(least)), 10.0 ** math.ceil(math.log10(most) + 1e-9)
    if axis == "zero" and least >= 0:
        return 0.0, most or 1.0
    room = (most - least) / 10 or abs(most) / 10 or 1.0
    return least - room, most + room


def _share(value: float, least: float, most: float, axis: str) -> float:
    """Where between the ends of an axis `value` lies, from 0 to 1."""
    if axis == "log":
        value, least, most = math.log(value), math.log(least), math.log(most)
    return (value - least) / (most - least)


def _text(text: str, limit: int = 120) -> str:
    return escape(printable(text, limit))
