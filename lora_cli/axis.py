"""An axis of a plot: where a number lies on it, and the round numbers beside it. Knows numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

__all__ = ["Axis", "as_number", "axis_of", "rounded"]

_TICKS = 5


@dataclass(frozen=True)
class Axis:
    """From its first tick to its last."""

    ticks: Sequence[float]
    log: bool = False
    """Equal steps are equal ratios."""

    def share(self, value: float) -> float:
        """How far `value` lies along it: 0 at the first tick, 1 at the last."""
        first, last = self.ticks[0], self.ticks[-1]
        if self.log:
            return math.log(value / first) / math.log(last / first)
        return (value - first) / (last - first)


def axis_of(values: Sequence[float], *, log: bool = False) -> Axis:
    """One that all of `values` lie on; with `log` they have to be above 0."""
    return Axis(_log_ticks(min(values), max(values)) if log else _ticks(min(values), max(values)), log)


def as_number(value: str) -> float | None:
    """The finite number that `value` is; None of a name."""
    with suppress(ValueError):
        number = float(value)
        return number if math.isfinite(number) else None
    return None


def rounded(value: float) -> str:
    """A number at a tick: 0.25, 20k, 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{0.0 if abs(value) < 1e-12 else value:.3g}"


def _ticks(least: float, most: float) -> list[float]:
    """Round numbers from below the least to above the largest."""
    if least == most:
        least, most = least - (abs(least) or 1) * 0.1, most + (abs(most) or 1) * 0.1
    rough = (most - least) / _TICKS
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _log_ticks(least: float, most: float) -> list[float]:
    """Powers of ten, or where these are too few to read a value from, 1, 2 and 5 times these."""
    first, last = math.floor(math.log10(least)), math.ceil(math.log10(most))
    powers = range(first, max(last, first + 1) + 1)
    if len(powers) > 3:
        return [10.0**power for power in powers]
    fine = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    begin = max(place for place, tick in enumerate(fine) if tick <= least * (1 + 1e-9))
    end = next(place for place, tick in enumerate(fine) if tick >= most * (1 - 1e-9) and place > begin)
    return fine[begin : end + 1]
