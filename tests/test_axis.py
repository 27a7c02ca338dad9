"""Round numbers around what is drawn, and places between them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.axis import as_number, axis_of, rounded


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=9))
def test_every_number_lies_on_its_axis(values: list[float]) -> None:
    axis = axis_of(values)
    assert all(-1e-6 <= axis.share(value) <= 1 + 1e-6 for value in values)


@given(st.lists(st.floats(1e-9, 1e12), min_size=1, max_size=9))
def test_and_on_one_of_equal_ratios(values: list[float]) -> None:
    axis = axis_of(values, log=True)
    assert all(-1e-6 <= axis.share(value) <= 1 + 1e-6 for value in values)
    assert axis.share((axis.ticks[0] * axis.ticks[-1]) ** 0.5) == pytest.approx(0.5)


def test_ticks_are_round_and_few_decades_have_finer_ones() -> None:
    assert axis_of([0.13, 0.88]).ticks == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert axis_of([908, 2444], log=True).ticks == pytest.approx([500, 1000, 2000, 5000])
    assert axis_of([1, 9e5], log=True).ticks == pytest.approx([10**n for n in range(7)])


def test_numbers_are_read_and_written_short() -> None:
    assert (as_number("1e-4"), as_number("dora"), as_number("nan")) == (1e-4, None, None)
    assert [rounded(value) for value in (0.25, 20_000, 1.5e6, 1e-17)] == ["0.25", "20k", "1.5M", "0"]
