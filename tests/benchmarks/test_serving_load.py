"""The load test's figures: the middle of its rounds, ratios round by round, a table that the page takes."""

from __future__ import annotations

from serving_load import KINDS, MARKS, PAGE, Round, figures, page


def test_the_middle_round_counts_and_ratios_are_those_of_a_round() -> None:
    ours = [Round(100.0, 1.0, 2.0, [0.5]), Round(10.0, 2.0, 3.0, [0.5]), Round(90.0, 9.0, 9.0, [0.5])]
    other = [Round(50.0, 5.0, 6.0, [0.5]), Round(4.0, 6.0, 7.0, [0.25]), Round(30.0, 7.0, 8.0, [0.5])]
    found = figures(other, ours)
    assert (found["requests_per_s"], found["p50_ms"], found["p99_ms"]) == (30.0, 6.0, 7.0)
    assert found["ours_to_this"] == 2.5
    assert found["largest_difference"] == 0.25


def test_the_table_takes_its_place_in_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    side = {"requests_per_s": 81.2, "p50_ms": 11.9, "p99_ms": 20.0, "ours_to_this": 1.5}
    settings = {"clients": 200, "requests": 9, "rounds": 5, "threads": 2, "batch_tokens": 1024}
    versions = {"torch": "2", "peft": "0"}
    results = {
        "settings": settings,
        "date": "2026-01-01T00",
        "versions": versions,
        "cases": {"8": dict.fromkeys(KINDS, side)},
    }
    made = page(text, results)
    assert "| 8 | `lora serve` | 81 | 12 | 20 | 1.50 |" in made
    assert made.partition(MARKS[0])[0] == text.partition(MARKS[0])[0]
    assert page(made, results) == made
