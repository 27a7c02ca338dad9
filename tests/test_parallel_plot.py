"""A line a configuration, through what it is on every axis."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from lora_cli.parallel_plot import parallel_plot

ROWS = {
    "first": ["8", "0.01", "dora", "0.9"],
    "second": ["2", "0.001", "lora", "0.8"],
    "third": ["4", "0.0001", "lora", "0.5"],
}


def drawn(
    rows: dict[str, list[str]], columns: tuple[str, ...] = ("r", "lr", "lora", "accuracy")
) -> ElementTree.Element:
    html = parallel_plot(columns, rows)
    return ElementTree.fromstring(html[html.index("<svg") : html.index("</svg>") + 6])


def lines(svg: ElementTree.Element) -> dict[str, list[tuple[float, float]]]:
    found = {line.findtext("title"): line.attrib["points"].split() for line in svg.findall("polyline")}
    return {name: [tuple(map(float, point.split(","))) for point in points] for name, points in found.items()}


def test_larger_is_higher_and_names_have_a_point_each() -> None:
    found = lines(drawn(ROWS))
    heights = {name: [y for _, y in points] for name, points in found.items()}
    assert heights["first"][0] < heights["third"][0] < heights["second"][0], "8, 4, 2"
    assert heights["first"][3] < heights["second"][3] < heights["third"][3]
    assert heights["second"][2] == heights["third"][2] != heights["first"][2]
    assert [x for x, _ in found["first"]] == [x for x, _ in found["second"]]


def test_more_than_a_decade_has_equal_steps_for_equal_ratios() -> None:
    first, second, third = (points[1][1] for _, points in sorted(lines(drawn(ROWS)).items()))
    assert second - first == pytest.approx(third - second, abs=0.2)


def test_the_best_is_over_all_others_and_the_strongest() -> None:
    *others, best = drawn(ROWS).findall("polyline")
    assert (best.findtext("title"), best.attrib["class"]) == ("first", "best")
    strengths = [int(re.search("([0-9]+)%", line.attrib["style"])[1]) for line in (*others, best)]
    assert strengths == sorted(strengths)


def test_numbers_are_short_names_escaped_and_texts_do_not_meet() -> None:
    rows = {str(n): [f"0.00{n}23456789", "<b>", "x", f"0.5000{n}"] for n in range(1, 4)}
    svg = drawn(rows)
    texts = [text.text for text in svg.findall("text")]
    assert "0.00123" in texts
    assert "<b>" in texts
    assert len([text for text in texts if text.startswith("0.5")]) >= 1
    heights: dict[str, list[float]] = {}
    for text in svg.findall("text"):
        heights.setdefault(text.attrib["x"], []).append(float(text.attrib["y"]))
    gaps = [b - a for found in heights.values() for a, b in zip(sorted(found), sorted(found)[1:], strict=False)]
    assert min(gaps) >= 13
