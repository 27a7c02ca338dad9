"""Exponents of growth and the page made of them; nothing is timed here."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import growth
from figures import replaced


def points(step_s: Callable[[float], float]) -> list[growth.Point]:
    """Steps that take `step_s`, in a process that always takes as much memory."""
    return [
        {"x": x, "step_s": step_s(x), "peak_rss_mib": 600.0 + x / 100, "first_step_s": 8.0}
        for x in (16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
    ]


@pytest.fixture
def measured() -> dict[str, Any]:
    """A document as growth.py writes it, of one series."""
    settings = {"threads": 2, "steps": 20, "batch_size": 8, "seed": 0}
    found = points(lambda x: 0.1 + 0.001 * x)
    return {"length": {"date": "2026-01-02T03:04:05", "settings": settings, "points": found}}


@pytest.mark.parametrize(
    ("step_s", "least", "most"),
    [
        (lambda x: 5 + 0.01 * x, 0.999, 1.001),
        (lambda x: 5 + 0.001 * x * x, 1.6, 2.0),
        (lambda x: 5 + 0.01 * x + 0.0001 * x * x, 1.1, 1.6),
    ],
)
def test_the_exponent_is_that_of_what_is_added(step_s: Callable[[float], float], least: float, most: float) -> None:
    found = growth.exponent(points(step_s), "step_s")
    assert found is not None
    assert least < found < most


def test_noise_is_no_growth() -> None:
    assert growth.exponent(points(lambda x: 0.5 + 0.02 * (x == 64)), "step_s") is None
    assert growth.exponent(points(lambda x: 0.5), "peak_rss_mib") is None


def test_texts_are_as_long_as_they_are_said_to_be(tmp_path: Path) -> None:
    growth._write(tmp_path / "a.csv", 5, 16, 0)
    with (tmp_path / "a.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [len(row["text"].split()) + growth.SPECIAL for row in rows] == [16] * 5
    assert {row["label"] for row in rows} == {"no", "yes"}


def test_the_page_and_the_plot_are_made_of_what_was_measured(measured: dict[str, Any]) -> None:
    text = "a\n<!-- measured: begin -->\nb\n<!-- measured: end -->\n"
    text += "<!-- growth: begin, so -->\nold\n<!-- growth: end -->\n"
    made = replaced(text, growth.BLOCK, growth.block(measured))
    assert "old" not in made
    assert "-->\nb\n<!--" in made
    assert "2026-01-02, threads: 2, batches of 8." in made
    assert "| tokens of each row | 16, 512 | 116, 612 | 1.00 | 600.2, 605.1 | flat | 8, 8 | flat |" in made
    drawn = growth.plot(measured)
    assert drawn.count('class="dot"') == 3 * 6
    assert "prefers-color-scheme: dark" in drawn


def test_the_page_shows_the_measurements_that_are_kept() -> None:
    results = growth.ROOT / "benchmarks" / "results" / "growth.json"
    document = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    text = growth.PAGE.read_text(encoding="utf-8")
    assert replaced(text, growth.BLOCK, growth.block(document)) == text, "run python benchmarks/growth.py --page"
    if document:
        assert growth.PLOT.read_text(encoding="utf-8") == growth.plot(document)
