"""What is measured, and the page made of it; nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import speed
from cases import CASES, DEFAULT, Case, Workplace, mean_loss
from peers import KINDS

TOP = [{"operator": "aten::addmm", "share": 0.5, "ms_per_step": 12.25, "calls_per_step": 60.0}]


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path, threads=2, seed=0, rows=64)


@pytest.fixture
def measured() -> dict[str, Any]:
    """A document as speed.py writes it, of one case."""
    sides = {side: {"rows_per_s": 3.0} for side in CASES["full"].sides}
    return {"full": {"date": "2026-01-02T03:04:05", "settings": {"rows": 1600, "threads": 2}, "repeats": [sides]}}


@pytest.mark.parametrize("name", CASES)
def test_the_sides_that_are_compared_are_measured(name: str) -> None:
    assert {side for pair in CASES[name].pairs for side in pair} == set(CASES[name].sides)


def test_the_largest_case_is_run_only_when_asked_for() -> None:
    assert set(CASES) - set(DEFAULT) == {"train-10k"}


def test_every_peer_has_a_name() -> None:
    assert {"trainer", "same-start", "grouped", "loralib", "one-by-one", "batched"} == set(KINDS)


def test_sides_take_turns(place: Workplace) -> None:
    called: list[str] = []

    def side(name: str, value: float) -> Any:
        return lambda place, folder: called.append(name) or {"wall_s": value}

    case = Case("two", {"a": side("a", 1.0), "b": side("b", 2.0)}, [("a", "b")])
    *_, repeats = speed.turns("two", case, place, 2)
    assert called == ["a", "b", "a", "b"]
    assert repeats == [{"a": {"wall_s": 1.0}, "b": {"wall_s": 2.0}}] * 2
    assert list(place.scratch.iterdir()) == []


def test_the_mean_loss_weighs_a_line_by_its_steps(tmp_path: Path) -> None:
    lines = [{"step": 10, "train/loss": 3.0}, {"step": 10, "validation/loss": 9.0}, {"step": 15, "train/loss": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert mean_loss(tmp_path / "metrics.jsonl") == (10 * 3.0 + 5 * 1.5) / 15


def test_the_page_is_made_anew_from_what_was_measured(measured: dict[str, Any]) -> None:
    text = "before\n<!-- measured: begin, by us -->\nold\n<!-- measured: end -->\nafter\n"
    made = speed.page(text, measured | {"profile": {"top": TOP}})
    assert "old" not in made
    assert "1,600 rows; 2026-01-02, threads: 2, turns: 1." in made
    assert "| ours / Trainer, full | 1.00 (1.00–1.00) |" in made
    assert "| aten::addmm | 50.0% | 12.2 | 60 |" in made
    assert (made.startswith("before\n"), made.endswith("after\n")) == (True, True)
    assert speed.page(made, measured | {"profile": {"top": TOP}}) == made


def test_the_page_shows_the_measurements_that_are_kept() -> None:
    results = speed.ROOT / "benchmarks" / "results" / "speed.json"
    document = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    text = speed.PAGE.read_text(encoding="utf-8")
    assert speed.page(text, document) == text, "run python benchmarks/speed.py --page"
