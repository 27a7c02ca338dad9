"""Lines and dots land where their numbers are."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.xy_plot import xy_plot

FINITE = st.floats(-1e12, 1e12)


def svg_of(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(html[html.index("<svg") : html.index("</svg>") + 6])


def points(html: str, number: int = 0) -> list[tuple[float, float]]:
    line = svg_of(html).findall("polyline")[number]
    return [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]


def test_a_line_goes_right_with_x_and_up_with_y() -> None:
    first, second, third = points(xy_plot({"a": [(0, 0), (5, 10), (10, 5)]}, x_label="x", y_label="y"))
    assert first[0] < second[0] < third[0]
    assert first[1] > third[1] > second[1], "up is less"
    assert second[0] - first[0] == pytest.approx(third[0] - second[0], abs=0.2)


def test_powers_of_ten_are_equally_far_apart() -> None:
    html = xy_plot({"a": [(1, 1), (10, 2), (1000, 3)]}, x_label="x", y_label="y", log_x=True)
    (first, _), (second, _), (third, _) = points(html)
    assert third - second == pytest.approx(2 * (second - first), abs=0.3)


@given(st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=20))
def test_whatever_the_numbers_everything_is_inside(values: list[tuple[float, float]]) -> None:
    svg = svg_of(xy_plot({"a": values}, x_label="x", y_label="y", dots=True))
    for circle in svg.findall("circle"):
        assert 0 <= float(circle.attrib["cx"]) <= 640
        assert 0 <= float(circle.attrib["cy"]) <= 300


def test_what_is_no_number_is_left_out() -> None:
    html = xy_plot({"a": [(0, 1), (1, math.nan), (math.inf, 1), (2, 2)]}, x_label="x", y_label="y")
    assert len(points(html)) == 2
    assert xy_plot({"a": [(0, math.nan)]}, x_label="x", y_label="y") == "<p>nothing to draw</p>"


def test_all_lines_of_a_legend_look_different_and_as_their_names_do() -> None:
    series = {str(number): [(0, number), (1, number)] for number in range(12)}
    html = xy_plot(series, x_label="x", y_label="y")
    looks = {line.findtext("title"): line.attrib["class"] for line in svg_of(html).findall("polyline")}
    assert len(set(looks.values())) == 12
    assert dict(re.findall(r'<i class="([^"]+)"></i>([^<]+)', html)) == {look: name for name, look in looks.items()}


def test_dots_at_one_place_are_rings_with_their_number_and_others_are_dots() -> None:
    html = xy_plot({"a": [(1, 1)], "b": [(1, 1)], "c": [(2, 2)]}, x_label="x", y_label="y", dots=True)
    radii = {circle.findtext("title"): float(circle.attrib["r"]) for circle in svg_of(html).findall("circle")}
    assert radii["c"] == radii["a"] < radii["b"]
    assert re.findall("×[0-9]+", html) == ["×2"]
    assert [circle.findtext("title") for circle in svg_of(html).findall("circle")][:2] == ["b", "a"], "a is in front"


def test_a_line_that_runs_as_another_does_is_its_edge() -> None:
    html = xy_plot({"a": [(0, 1), (1, 1)], "b": [(0, 1), (1, 1)], "c": [(0, 0), (1, 2)]}, x_label="x", y_label="y")
    drawn = {line.findtext("title"): line.attrib.get("style") for line in svg_of(html).findall("polyline")}
    assert drawn == {"a": None, "b": "stroke-width: 5", "c": None}
    assert list(drawn) == ["c", "b", "a"], "a is in front"


def test_dots_of_one_series_hide_each_other() -> None:
    html = xy_plot({"rows": [(1, 1), (1, 1), (2, 2)]}, x_label="x", y_label="y", dots=True)
    assert len({circle.attrib["r"] for circle in svg_of(html).findall("circle")}) == 1
    assert "×" not in html


def test_bars_go_through_their_dots_and_the_front_from_dot_to_dot() -> None:
    series, bars = {"a": [(1, 0.5)], "b": [(2, 0.7)]}, {"a": (0.1, 0.9)}
    svg = svg_of(xy_plot(series, x_label="x", y_label="y", dots=True, bars=bars, front=[(1, 0.5), (2, 0.7)]))
    first, second = svg.findall("circle")
    (bar,) = (line for line in svg.findall("line") if "bar" in line.attrib["class"])
    assert bar.attrib["x1"] == bar.attrib["x2"] == first.attrib["cx"]
    assert 0 < float(bar.attrib["y1"]) < float(first.attrib["cy"]) < float(bar.attrib["y2"]) < 300
    (front,) = (line for line in svg.findall("polyline") if line.attrib["class"] == "front")
    assert front.attrib["points"] == " ".join(f"{dot.attrib['cx']},{dot.attrib['cy']}" for dot in (first, second))


def test_names_are_escaped_and_told_in_a_legend() -> None:
    html = xy_plot({"<script>": [(0, 1)], "b": [(1, 1)]}, x_label="<x>", y_label="y", dots=True)
    assert "<script>" not in html
    assert "<x>" not in html
    assert re.findall(r"</i>([^<]+)</li>", html) == ["&lt;script&gt;", "b"]


def test_a_long_line_is_thinned_and_keeps_its_end() -> None:
    drawn = points(xy_plot({"a": [(n, n) for n in range(100_000)]}, x_label="x", y_label="y"))
    assert len(drawn) < 1000
    assert drawn[-1] == points(xy_plot({"a": [(0, 0), (99_999, 99_999)]}, x_label="x", y_label="y"))[-1]
