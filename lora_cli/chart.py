"""Lines in a picture, as SVG written by hand: no plotting library. Knows numbers and names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

__all__ = ["line_chart"]

_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
_WIDTH, _HEIGHT = 780, 400
_LEFT, _TOP, _RIGHT, _BOTTOM = 64, 48, 250, 56
_MAX_NAMES = 14
"""Lines of a legend that fit beside the plot. After as many as there are colours they are dashed."""


def line_chart(
    title: str,
    lines: Mapping[str, Sequence[Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    level: float | None = None,
) -> str:
    """Shares (0 to 1) over 1, 2, 3, ...: for each name one thick line, the mean of its thin ones. `level` is dashed.

    A line that ends early goes on at its last value.
    """
    longest = max((len(line) for group in lines.values() for line in group), default=1)
    body = [_axes(longest, x_label, y_label)]
    if level is not None:
        y = _y(level)
        body.append(f'<path d="M{_LEFT} {y}H{_WIDTH - _RIGHT}" stroke="#111" stroke-dasharray="5 4"/>')
        body.append(f'<text x="{_WIDTH - _RIGHT + 6}" y="{y + 4}">{level:.0%}</text>')
    for number, (name, group) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        dash = ' stroke-dasharray="8 4"' if number // len(_COLOURS) % 2 else ""
        drawn = [[*line, *[line[-1]] * (longest - len(line))] for line in group]
        body += [_line(line, colour, 'stroke-opacity="0.25"') for line in drawn if len(drawn) > 1]
        mean = [sum(values) / len(drawn) for values in zip(*drawn, strict=True)]
        body.append(_line(mean, colour, f'stroke-width="2.5"{dash}'))
        if number < _MAX_NAMES:
            body.append(_legend(number, colour, name, len(group), dash))
    if len(lines) > _MAX_NAMES:
        body.append(_legend(_MAX_NAMES, "none", f"and {len(lines) - _MAX_NAMES} more", 1))
    heading = f'<text x="{_LEFT}" y="26" font-size="16" font-weight="600">{escape(title)}</text>'
    style = 'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#111"'
    frame = f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>'
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    inside = "\n".join([frame, heading, *body])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{inside}\n</svg>\n'


def _x(place: int, longest: int) -> float:
    return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * (place - 1) / max(longest - 1, 1), 1)


def _y(share: float) -> float:
    return round(_HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share, 1)


def _line(values: Sequence[float], colour: str, extra: str) -> str:
    points = " ".join(f"{_x(place, len(values))},{_y(value)}" for place, value in enumerate(values, 1))
    # A single point is no line; a dot shows it.
    if len(values) == 1:
        return f'<circle cx="{_x(1, 1)}" cy="{_y(values[0])}" r="3" fill="{colour}"/>'
    return f'<polyline points="{points}" fill="none" stroke="{colour}" {extra}/>'


def _axes(longest: int, x_label: str, y_label: str) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<path d="M{_LEFT} {_y(share)}H{right}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{_y(share) + 4}" text-anchor="end">{share:.0%}</text>')
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if longest <= 12 * step)
    for place in sorted({1, *range(step, longest + 1, step)}):
        parts.append(f'<text x="{_x(place, longest)}" y="{bottom + 18}" text-anchor="middle">{place}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{bottom + 40}" text-anchor="middle">{escape(x_label)}</text>')
    height = (_TOP + bottom) / 2
    turned = f'transform="rotate(-90 18 {height})"'
    parts.append(f'<text x="18" y="{height}" text-anchor="middle" {turned}>{escape(y_label)}</text>')
    return "\n".join(parts)


def _legend(number: int, colour: str, name: str, lines: int, dash: str = "") -> str:
    x, y = _WIDTH - _RIGHT + 44, _TOP + 8 + 20 * number
    text = escape(name if len(name) <= 20 else f"…{name[-19:]}") + (f" ({lines})" if lines > 1 else "")
    key = f'<path d="M{x} {y}h16" stroke="{colour}" stroke-width="3"{dash}/>'
    return f'{key}<text x="{x + 22}" y="{y + 4}">{text}</text>'
