"""Lines and dots over two axes as SVG, in the colours of the page around it. Knows numbers and names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from lora_cli.errors import printable

__all__ = ["COLOURS", "xy_plot"]

COLOURS = 8
"""Classes c0 to c7, whose colours the page sets; more series begin again."""
_WIDTH, _HEIGHT = 640, 300
_LEFT, _TOP, _RIGHT, _BOTTOM = 60, 14, 14, 46
_TICKS = 5
_MAX_LEGEND = 12
_MAX_POINTS = 600
"""Points of a line that are drawn: no screen shows more."""

Point = tuple[float, float]


def xy_plot(
    series: Mapping[str, Sequence[Point]], *, x_label: str, y_label: str, dots: bool = False, log_x: bool = False
) -> str:
    """An <svg> and its legend: a line for each series, or with `dots` its points, each named by the series.

    Points that are no finite numbers are left out; with `log_x` also those at 0 and below.
    """
    kept = {name: _thinned([point for point in points if _fits(point, log_x)]) for name, points in series.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return "<p>nothing to draw</p>"
    everything = [point for points in kept.values() for point in points]
    x_ticks = _log_ticks([x for x, _ in everything]) if log_x else _ticks([x for x, _ in everything])
    y_ticks = _ticks([y for _, y in everything])
    low, high = (math.log10(x_ticks[0]), math.log10(x_ticks[-1])) if log_x else (x_ticks[0], x_ticks[-1])

    def place(point: Point) -> str:
        x = math.log10(point[0]) if log_x else point[0]
        across = (x - low) / (high - low)
        up = (point[1] - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        left = _LEFT + across * (_WIDTH - _LEFT - _RIGHT)
        top = _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)
        return f"{left:.1f},{top:.1f}"

    body = [_grid(x_ticks, y_ticks, place), *_labels(x_label, y_label)]
    for number, (name, points) in enumerate(kept.items()):
        colour = f"c{number % COLOURS}"
        title = f"<title>{escape(printable(name, 120))}</title>"
        if dots or len(points) == 1:
            for point in points:
                x, y = place(point).split(",")
                body.append(f'<circle class="{colour}" cx="{x}" cy="{y}" r="5">{title}</circle>')
        else:
            path = " ".join(map(place, points))
            body.append(f'<polyline class="{colour}" points="{path}">{title}</polyline>')
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(body)}</svg>'
    return svg + _legend(list(kept))


def _fits(point: Point, log_x: bool) -> bool:
    return all(map(math.isfinite, point)) and (point[0] > 0 or not log_x)


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    step = math.ceil(len(points) / _MAX_POINTS)
    return [*points[:: max(step, 1)], points[-1]] if step > 1 else points


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers from below the least to above the largest."""
    least, most = min(values), max(values)
    if least == most:
        least, most = least - (abs(least) or 1) * 0.1, most + (abs(most) or 1) * 0.1
    rough = (most - least) / _TICKS
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _log_ticks(values: Sequence[float]) -> list[float]:
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def _grid(x_ticks: Sequence[float], y_ticks: Sequence[float], place: object) -> str:
    assert callable(place)
    parts = []
    for tick in x_ticks:
        x = place((tick, y_ticks[0])).split(",")[0]
        parts.append(
            f'<text class="tick" x="{x}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{_shown(tick)}</text>'
        )
    for tick in y_ticks:
        y = place((x_ticks[0], tick)).split(",")[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{_shown(tick)}</text>'
        )
    return "".join(parts)


def _labels(x_label: str, y_label: str) -> list[str]:
    across, down = (_WIDTH + _LEFT - _RIGHT) / 2, (_HEIGHT - _BOTTOM + _TOP) / 2
    turned = f'transform="translate(13 {down}) rotate(-90)"'
    return [
        f'<text class="axis" x="{across}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text class="axis" {turned} text-anchor="middle">{escape(y_label)}</text>',
    ]


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    items = [
        f'<li><i class="c{number % COLOURS}"></i>{escape(printable(name, 120))}</li>'
        for number, name in enumerate(names[:_MAX_LEGEND])
    ]
    more = f"<li>and {len(names) - _MAX_LEGEND} more</li>" if len(names) > _MAX_LEGEND else ""
    return f'<ul class="legend">{"".join(items)}{more}</ul>'


def _shown(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{0.0 if abs(value) < 1e-12 else value:.3g}"
