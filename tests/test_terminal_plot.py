"""Plots of characters: what is drawn is where it belongs, whatever the numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.terminal_plot import curve, places

NUMBERS = st.floats(-1e12, 1e12, allow_nan=False)


def test_a_falling_line_goes_from_the_upper_left_to_the_lower_right() -> None:
    title, *rows, foot = curve("loss", [(1, 0.7), (2, 0.35), (3, 0.0)]).splitlines()
    assert title == "loss"
    assert len(rows) == 8
    assert rows[0] == "0.7 │⠉⠒⠒⠤⠤⣀⣀"
    assert rows[-1].startswith("  0 │")
    assert [len(row) for row in rows] == sorted(len(row) for row in rows)
    assert foot.strip() == "└1" + "─" * 54 + "3"


def test_a_single_value_stands_in_the_middle_and_is_named_once() -> None:
    drawn = curve("loss", [(3, 0.5)])
    assert drawn.count("0.5") == 1
    assert drawn.splitlines()[4].startswith("0.5 │")


def test_a_point_is_known_by_its_number_and_the_first_hides_others() -> None:
    drawn = places("accuracy", [(100, 0.9), (10, 0.5), (100, 0.9)])
    assert drawn.splitlines()[1] == "0.9 │" + " " * 55 + "1"
    assert drawn.splitlines()[8] == "0.5 │2"
    assert "3" not in drawn


@pytest.mark.parametrize("plot", [curve, places])
@given(points=st.lists(st.tuples(st.floats(1e-6, 1e12), NUMBERS), min_size=1, max_size=30))
def test_nothing_is_wider_than_a_terminal(plot, points: list[tuple[float, float]]) -> None:
    lines = plot("title", points).splitlines()
    assert len(lines) == 10
    assert max(map(len, lines)) < 80
