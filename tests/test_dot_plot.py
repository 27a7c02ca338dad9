"""The plot is an image that any reader of XML can read, and every dot stands where its value belongs."""

from __future__ import annotations

from statistics import fmean
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.dot_plot import Panel, dot_plot

SVG = "{http://www.w3.org/2000/svg}"


def plotted(values: dict[str, list[float]], axis: str = "zero", **more: object) -> ElementTree.Element:
    panel = Panel("figure", values, lambda value: f"{value:g}", axis, **more)  # type: ignore[arg-type]
    return ElementTree.fromstring(dot_plot("title", list(values), [panel]))


def dots(image: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(dot.get("cx", "nan")), float(dot.get("cy", "nan"))) for dot in image.iter(f"{SVG}circle")]


def texts(image: ElementTree.Element) -> list[str | None]:
    return [text.text for text in image.iter(f"{SVG}text")]


@pytest.mark.parametrize("axis", ["zero", "near", "log"])
@given(values=st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_dots_stand_in_the_order_of_their_values_and_inside_the_image(axis: str, values: list[float]) -> None:
    image = plotted({"a": values, "b": []}, axis)
    found = dots(image)
    assert len(found) == len(values)
    assert all(0 < x < float(image.get("width", "0")) for x, _ in found)
    ordered = [x for _, x in sorted(zip(values, (x for x, _ in found), strict=True))]
    assert ordered == sorted(ordered)


def test_equal_ratios_are_equal_steps_on_a_logarithmic_axis() -> None:
    xs = [x for x, _ in dots(plotted({"a": [10, 100, 1000]}, "log"))]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)


def test_an_axis_from_zero_shows_twice_as_much_twice_as_far() -> None:
    image = plotted({"a": [5.0], "b": [10.0]})
    axis = min(float(line.get("x1", "nan")) for line in image.iter(f"{SVG}line"))
    (half, _), (whole, _) = dots(image)
    assert whole - axis == pytest.approx(2 * (half - axis), abs=0.2)


def test_the_middle_of_a_row_is_written_beside_it() -> None:
    assert "2" in texts(plotted({"a": [1.0, 2.0, 9.0]}))
    assert "4" in texts(plotted({"a": [1.0, 2.0, 9.0]}, middle=fmean))


def test_names_cannot_break_out_of_the_image() -> None:
    image = plotted({'<script>"&\x1b[31m': [1.0]})
    assert image.findall(f".//{SVG}script") == []
    assert any(text and text.startswith("<script>") for text in texts(image))
    assert "\x1b" not in ElementTree.tostring(image, encoding="unicode")


def test_rows_and_panels_without_values_are_empty() -> None:
    assert dots(plotted({"a": [], "b": []})) == []
    assert {"a", "b", "figure"} <= set(texts(plotted({"a": [], "b": []})))
    assert dots(plotted({"a": [0.0, 0.0]})) != []
