"""The chart is well-formed, and what it draws lies where the numbers say."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from lora_cli.chart import line_chart

SVG = "{http://www.w3.org/2000/svg}"


def drawn(**lines: list[list[float]]) -> ElementTree.Element:
    return ElementTree.fromstring(line_chart("a < b", lines, x_label="rank", y_label="share", level=0.9))


def points(element: ElementTree.Element) -> list[tuple[float, ...]]:
    return [tuple(map(float, pair.split(","))) for pair in element.attrib["points"].split()]


def test_a_thick_line_is_the_mean_of_its_thin_ones() -> None:
    one, other, mean = (points(line) for line in drawn(a=[[0.0, 1.0], [0.5, 1.0]]).iter(f"{SVG}polyline"))
    assert mean[0][1] == pytest.approx((one[0][1] + other[0][1]) / 2, abs=0.1)
    assert one[0][1] > other[0][1] > one[1][1] == other[1][1]


def test_a_line_that_ends_early_goes_on() -> None:
    _, short = drawn(a=[[0.2, 0.4, 1.0]], b=[[1.0]]).iter(f"{SVG}polyline")
    assert len(points(short)) == 3
    assert len({y for _, y in points(short)}) == 1


def test_one_value_is_a_dot_and_text_is_escaped() -> None:
    chart = drawn(**{"x & y": [[1.0]]})
    assert len(list(chart.iter(f"{SVG}circle"))) == 1
    assert "a < b" in [text.text for text in chart.iter(f"{SVG}text")]


def test_a_long_legend_ends_with_a_count() -> None:
    chart = drawn(**{f"kind {number}": [[0.5, 1.0]] for number in range(20)})
    assert "and 6 more" in [text.text for text in chart.iter(f"{SVG}text")]


def test_after_all_colours_lines_are_dashed_and_so_are_their_names() -> None:
    chart = drawn(**{f"kind {number}": [[0.5, 1.0]] for number in range(12)})
    for tag in ("polyline", "path"):
        looks = [(each.get("stroke"), each.get("stroke-dasharray")) for each in chart.iter(f"{SVG}{tag}")]
        assert len(set(looks[-12:])) == 12
