"""Lines and dots over two axes as SVG, in the colours of the page around it. Knows numbers and names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from lora_cli.axis import Axis, axis_of, rounded
from lora_cli.errors import printable

__all__ = ["xy_plot"]

_COLOURS, _KINDS = 8, 3
"""Classes c0 to c7 and k0 to k2, which the page draws: a colour, and a dash or a shape. More series begin again."""
_WIDTH, _HEIGHT = 640, 300
_LEFT, _TOP, _RIGHT, _BOTTOM = 60, 14, 20, 46
_RADIUS, _LINE, _RING, _MAX_RINGS = 5, 2, 3, 5
"""Of a dot, of a line, what each one at the same place adds, and how many are drawn."""
_MAX_LEGEND = 12
_MAX_POINTS = 600
"""Points of a line that are drawn: no screen shows more."""

Point = tuple[float, float]


def xy_plot(
    series: Mapping[str, Sequence[Point]],
    *,
    x_label: str,
    y_label: str,
    dots: bool = False,
    log_x: bool = False,
    bars: Mapping[str, Point] | None = None,
    front: Sequence[Point] = (),
) -> str:
    """An <svg> that scrolls, and a legend: a line for each series, or with `dots` its points, each named by the series.

    Points that are no finite numbers are left out; with `log_x` also those at 0 and below. Lines and dots of several
    series at one place have each other as edges, dots with their number, and the first is in front. `bars` go from the
    lower to the upper value of a series, through its first point; `front` is a line behind the dots.
    """
    kept = {name: _thinned([point for point in points if _fits(point, log_x)]) for name, points in series.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return "<p>nothing to draw</p>"
    ends = {name: ends for name, ends in (bars or {}).items() if name in kept}
    everything = [point for points in kept.values() for point in points]
    x_axis = axis_of([x for x, _ in everything], log=log_x)
    y_axis = axis_of([*(y for _, y in everything), *(y for pair in ends.values() for y in pair)])

    def place(point: Point) -> Point:
        left = _LEFT + x_axis.share(point[0]) * (_WIDTH - _LEFT - _RIGHT)
        return round(left, 1), round(_HEIGHT - _BOTTOM - y_axis.share(point[1]) * (_HEIGHT - _TOP - _BOTTOM), 1)

    body = [_grid(x_axis, y_axis, place), *_labels(x_label, y_label)]
    if len(front) > 1:
        body.append(f'<polyline class="front" points="{_path(map(place, front))}"/>')
    looks = {name: f"c{number % _COLOURS} k{number // _COLOURS % _KINDS}" for number, name in enumerate(kept)}
    for name, (low, high) in ends.items():
        (x, top), (_, bottom) = place((kept[name][0][0], high)), place((kept[name][0][0], low))
        body.append(f'<line class="bar {looks[name]}" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>')
    lines = {} if dots else {name: points for name, points in kept.items() if len(points) > 1}
    body += _lines({name: _path(map(place, points)) for name, points in lines.items()}, looks)
    body += _dots({name: list(map(place, points)) for name, points in kept.items() if name not in lines}, looks)
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(body)}</svg>'
    return f'<div class="scroll plot">{svg}</div>{_legend(looks, lines=bool(lines))}'


def _fits(point: Point, log_x: bool) -> bool:
    return all(map(math.isfinite, point)) and (point[0] > 0 or not log_x)


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    step = math.ceil(len(points) / _MAX_POINTS)
    return [*points[:: max(step, 1)], points[-1]] if step > 1 else points


def _path(places: Iterable[Point]) -> str:
    return " ".join(f"{x},{y}" for x, y in places)


def _lines(paths: Mapping[str, str], looks: Mapping[str, str]) -> list[str]:
    """Those that run alike as edges of each other, so that none hides another."""
    drawn: list[str] = []
    before = Counter[str]()
    for name, path in paths.items():
        wide = f' style="stroke-width: {_LINE + _RING * before[path]}"' if before[path] else ""
        title = f"<title>{escape(printable(name, 120))}</title>"
        drawn.append(f'<polyline class="{looks[name]}"{wide} points="{path}">{title}</polyline>')
        before[path] = min(before[path] + 1, _MAX_RINGS)
    return drawn[::-1]


def _dots(series: Mapping[str, Sequence[Point]], looks: Mapping[str, str]) -> list[str]:
    """Marks; those of several series at one place around each other, so that none hides another."""
    found: list[tuple[Point, list[str]]] = []
    for name, places in series.items():
        for x, y in places:
            near = (names for (a, b), names in found if abs(a - x) < _RING and abs(b - y) < _RING)
            names = next(near, None) if len(series) > 1 else None
            if names is None:
                found.append(((x, y), [name]))
            elif name not in names:
                names.append(name)
    return [_rings(place, names, looks) for place, names in found]


def _rings(place: Point, names: Sequence[str], looks: Mapping[str, str]) -> str:
    """From the outermost, the last of `names`, to the dot in the middle."""
    x, y = place
    drawn = list(enumerate(names[:_MAX_RINGS]))
    marks = "".join(_mark(x, y, _RADIUS + _RING * ring, looks[name], name) for ring, name in reversed(drawn))
    if len(names) == 1:
        return marks
    side, anchor = (1, "start") if x < _WIDTH / 2 else (-1, "end")
    edge = x + side * (_RADIUS + _RING * len(drawn))
    return f'{marks}<text class="tick" x="{edge:.1f}" y="{y - 8:.1f}" text-anchor="{anchor}">×{len(names)}</text>'


def _mark(x: float, y: float, radius: float, look: str, name: str) -> str:
    """A circle, a square or a diamond."""
    title = f"<title>{escape(printable(name, 120))}</title>"
    if look.endswith("k0"):
        return f'<circle class="{look}" cx="{x}" cy="{y}" r="{radius}">{title}</circle>'
    wide = round(radius * 0.9, 1)
    square = f"M{x - wide:.1f} {y - wide:.1f}h{2 * wide}v{2 * wide}h{-2 * wide}z"
    half = radius + 1
    diamond = f"M{x:.1f} {y - half:.1f}l{half} {half}l{-half} {half}l{-half} {-half}z"
    return f'<path class="{look}" d="{square if look.endswith("k1") else diamond}">{title}</path>'


def _grid(x_axis: Axis, y_axis: Axis, place: Callable[[Point], Point]) -> str:
    parts = []
    for tick in x_axis.ticks:
        x, _ = place((tick, y_axis.ticks[0]))
        below = _HEIGHT - _BOTTOM + 18
        parts.append(f'<text class="tick" x="{x}" y="{below}" text-anchor="middle">{rounded(tick)}</text>')
    for tick in y_axis.ticks:
        _, y = place((x_axis.ticks[0], tick))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{rounded(tick)}</text>')
    return "".join(parts)


def _labels(x_label: str, y_label: str) -> list[str]:
    across, down = (_WIDTH + _LEFT - _RIGHT) / 2, (_HEIGHT - _BOTTOM + _TOP) / 2
    turned = f'transform="translate(13 {down}) rotate(-90)"'
    return [
        f'<text class="axis" x="{across}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text class="axis" {turned} text-anchor="middle">{escape(y_label)}</text>',
    ]


def _legend(looks: Mapping[str, str], *, lines: bool) -> str:
    if len(looks) < 2:
        return ""
    items = [
        f'<li><i class="{look}"></i>{escape(printable(name, 120))}</li>'
        for name, look in list(looks.items())[:_MAX_LEGEND]
    ]
    more = f"<li>and {len(looks) - _MAX_LEGEND} more</li>" if len(looks) > _MAX_LEGEND else ""
    return f'<ul class="legend{" lines" if lines else ""}">{"".join(items)}{more}</ul>'
