"""Where two records of one training part. Knows rows of metrics, not where they come from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.errors import RunError, printable

__all__ = ["Difference", "Row", "differing_versions", "first_difference", "read_metrics", "series"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """A value that is not the same in both; None where there is none."""

    step: int
    name: str
    ours: float | None
    theirs: float | None

    def __str__(self) -> str:
        return f"step {self.step}: {self.name} {_number(self.theirs)} recorded, {_number(self.ours)} now{self._by()}"

    def _by(self) -> str:
        if self.ours is None or self.theirs is None:
            return ""
        return f" ({abs(self.ours - self.theirs):.1e} apart)"


def first_difference(ours: Iterable[Row], theirs: Iterable[Row], *, tolerance: float = 0.0) -> Difference | None:
    """The first value, by step, that differs by more than `tolerance` times its size (at least 1), or None."""
    now, recorded = _values(ours), _values(theirs)
    for step, name in sorted(now.keys() | recorded.keys()):
        pair = now.get((step, name)), recorded.get((step, name))
        if not _equal(*pair, tolerance):
            return Difference(step, name, *pair)
    return None


def series(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """A figure of `read_metrics` over the steps at which it was noted."""
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl.

    Raises:
        RunError: it is missing, or a line is none of ours.
    """
    file = run / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
            raise ValueError("a line without a step")
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file}: not readable ({printable(error, 80)})") from error
    return rows


def differing_versions(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What of device and versions in two run.json is not the same, with both values: "torch 2.12, now 2.13"."""
    pairs = {"device": (theirs.get("device"), ours.get("device"))}
    known, now = theirs.get("versions", {}), ours.get("versions", {})
    pairs |= {name: (known.get(name), now.get(name)) for name in sorted(known.keys() | now.keys())}
    return [
        f"{name} {printable(was, 60)}, now {printable(new, 60)}" for name, (was, new) in pairs.items() if was != new
    ]


def _values(rows: Iterable[Row]) -> dict[tuple[int, str], float | None]:
    return {(row["step"], name): value for row in rows for name, value in row.items() if name != "step"}


def _equal(ours: float | None, theirs: float | None, tolerance: float) -> bool:
    if not isinstance(ours, int | float) or not isinstance(theirs, int | float):
        return ours == theirs
    return ours == theirs or math.isclose(ours, theirs, rel_tol=0, abs_tol=tolerance * max(1.0, abs(theirs)))


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.9g}" if isinstance(value, int | float) else printable(value, 40)
