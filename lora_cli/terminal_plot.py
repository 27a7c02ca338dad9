"""Plots of characters, for a terminal where there is no browser. Knows numbers and names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lora_cli.axis import rounded

__all__ = ["curve", "places"]

_WIDTH, _HEIGHT = 56, 8
"""Characters of a plot without what stands beside it."""
_BLANK = 0x2800
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Of a character of braille the bits of its dots, from above to below, left and right."""

Point = tuple[float, float]


def curve(title: str, points: Sequence[Point]) -> str:
    """Points of a line in their order, such as a loss over steps, joined up: braille has 2 × 4 dots a character."""
    xs, ys = _range(x for x, _ in points), _range(y for _, y in points)
    bits = [[0] * _WIDTH for _ in range(_HEIGHT)]
    dots = [(_place(x, xs, 2 * _WIDTH), _place(y, ys, 4 * _HEIGHT)) for x, y in points]
    for (left, low), (right, high) in zip(dots, [*dots[1:], dots[-1]], strict=True):
        steps = max(abs(right - left), abs(high - low), 1)
        for step in range(steps + 1):
            column, line = left + round((right - left) * step / steps), low + round((high - low) * step / steps)
            above = 4 * _HEIGHT - 1 - line
            bits[above // 4][column // 2] |= _DOTS[above % 4][column % 2]
    return _framed(title, ["".join(chr(_BLANK + each) for each in row) for row in bits], xs, ys)


def places(title: str, points: Sequence[Point]) -> str:
    """Each point as its number, from 1, such as configurations by rank, at the logarithm of x, which is above 0; of
    several in one place the first is seen.
    """
    xs, ys = _range(x for x, _ in points), _range(y for _, y in points)
    logs = math.log(xs[0]), math.log(xs[1])
    grid = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    for number, (x, y) in reversed(list(enumerate(points, 1))):
        name = str(number)
        column, row = _place(math.log(x), logs, _WIDTH - len(name) + 1), grid[_HEIGHT - 1 - _place(y, ys, _HEIGHT)]
        row[column : column + len(name)] = name
    return _framed(title, ["".join(row) for row in grid], xs, ys)


def _range(values: Iterable[float]) -> Point:
    found = list(values)
    return min(found), max(found)


def _place(value: float, ends: Point, size: int) -> int:
    """Which of `size` places between two ends a value has; the middle one where the ends are the same."""
    least, most = ends
    return round((value - least) / (most - least) * (size - 1)) if most > least else size // 2


def _framed(title: str, rows: Sequence[str], xs: Point, ys: Point) -> str:
    labels = [""] * len(rows)
    for end in ys:
        labels[len(rows) - 1 - _place(end, ys, len(rows))] = rounded(end)
    width = max(map(len, labels))
    lines = [f"{label:>{width}} │{row.rstrip(chr(_BLANK) + ' ')}" for label, row in zip(labels, rows, strict=True)]
    least, most = map(rounded, xs)
    return "\n".join([title, *lines, f"{'':{width}} └{least:─<{_WIDTH - len(most)}}{most}"])
