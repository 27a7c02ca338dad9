"""Medians, ratios and tables of repeated measurements."""

from __future__ import annotations

import pytest

from figures import aligned, markdown, medians, ratio, summary, table

PAIR = ("ours", "peer")
REPEATS = [
    {"ours": {"rows_per_s": 100.0, "wall_s": 20.0, "score": 0.5}, "peer": {"rows_per_s": 50.0, "score": 0.25}},
    {"ours": {"rows_per_s": 160.0, "wall_s": 22.0, "score": 0.5}, "peer": {"rows_per_s": 40.0, "score": 0.25}},
    {"ours": {"rows_per_s": 120.0, "wall_s": 90.0, "score": 0.5}, "peer": {"rows_per_s": 48.0, "score": 0.25}},
]
"""The machine was busy in one turn of ours."""


def test_a_side_is_its_median() -> None:
    assert medians(REPEATS, "ours") == {"rows_per_s": 120.0, "wall_s": 22.0, "score": 0.5}


def test_a_ratio_is_that_of_the_medians_and_its_spread_that_of_the_turns() -> None:
    found = ratio(REPEATS, "rows_per_s", PAIR)
    assert (found.value, found.low, found.high) == (120 / 48, 2.0, 4.0)
    assert str(found) == "2.50 (2.00–4.00)"


def test_an_even_number_of_turns_has_the_mean_of_the_middle_two() -> None:
    assert ratio(REPEATS[:2], "rows_per_s", PAIR).value == pytest.approx(130 / 45)


def test_the_table_has_a_line_for_each_side_and_each_pair() -> None:
    assert table(REPEATS, [PAIR]) == [
        ["", "train rows/s", "wall s", "score"],
        ["ours", "120.0", "22.0", "0.5000"],
        ["peer", "48.0", "", "0.2500"],
        ["ours / peer", "2.50 (2.00–4.00)", "", ""],
    ]


def test_the_summary_has_ratios_only_of_what_both_sides_have_and_what_is_a_speed_or_a_cost() -> None:
    found = summary(REPEATS, [PAIR])
    assert found["ratios"] == {"ours / peer": {"rows_per_s": {"value": 2.5, "low": 2.0, "high": 4.0}}}
    assert found["medians"] == {side: medians(REPEATS, side) for side in PAIR}


def test_cells_as_text_and_as_markdown() -> None:
    lines = [["", "rows/s"], ["ours", "9.0"]]
    assert aligned(lines) == "      rows/s\nours     9.0"
    assert markdown(lines) == "|  | rows/s |\n| --- | ---: |\n| ours | 9.0 |"
