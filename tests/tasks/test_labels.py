"""The rules by which a cell becomes a label."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.errors import DataError
from lora_cli.tasks.labels import label_cells, label_ids, label_names, label_numbers
from lora_cli.tasks.rows import Rows


def rows_of(*labels: object) -> Rows:
    return Rows([{"label": label} for label in labels], source="data.csv", separator=":")


def ids_of(names: list[str], *labels: object) -> list[int]:
    rows = rows_of(*labels)
    return label_ids(label_cells(rows, "label"), names, rows)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([10, 9, -1], ("-1", "9", "10")),
        (["10", "9"], ("9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        ([True, False], ("false", "true")),
    ],
)
def test_names_are_sorted_as_what_they_are(labels: list[object], names: tuple[str, ...]) -> None:
    assert label_names(label_cells(rows_of(*labels), "label"), "f") == names


def test_a_table_of_fractions_is_no_table_of_classes() -> None:
    with pytest.raises(DataError, match=r"task\.regression=true"):
        label_names(["0.5", "1", "2.25"], "f")


@pytest.mark.parametrize(
    ("names", "labels", "ids"),
    [
        (["neg", "pos"], ["pos", "neg"], [1, 0]),
        (["neg", "pos"], [1, 0], [1, 0]),
        (["neg", "pos"], ["1", "0"], [1, 0]),
        (["neg", "pos"], [True, False], [1, 0]),
        (["False", "True"], [True, False], [1, 0]),
        (["1", "2", "3"], [3, 1], [2, 0]),
        (["1", "2", "3"], ["3", "1"], [2, 0]),
        (["1", "x"], ["1", "x"], [0, 1]),
    ],
)
def test_a_name_goes_before_an_id(names: list[str], labels: list[object], ids: list[int]) -> None:
    assert ids_of(names, *labels) == ids


@settings(max_examples=50, deadline=None)
@given(
    st.one_of(
        st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=9),
        st.lists(st.integers(-99, 99), min_size=1, max_size=9),
        st.lists(st.booleans(), min_size=1, max_size=9),
    )
)
def test_labels_that_made_the_names_map_back_to_them(labels: list[object]) -> None:
    names = label_names(label_cells(rows_of(*labels), "label"), "f")
    found = [names[number] for number in ids_of(list(names), *labels)]
    assert found == [str(label).lower() if isinstance(label, bool) else str(label) for label in labels]


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["1", "2", "3"], 0),
        (["a", "b"], 2),
        (["a", "b"], -1),
        (["a", "b"], "A"),
        (["a", "b"], "01"),
        (["a", "b", "c"], True),
    ],
)
def test_an_unknown_label_is_refused_with_the_known_ones(names: list[str], label: object) -> None:
    with pytest.raises(DataError, match=rf"data.csv:1: no label '{label}'.* There are: {', '.join(names)}"):
        ids_of(names, label)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["a", None], "data.csv:2: the label (column 'label') is null"),
        ([1, math.nan], "data.csv:2: the label (column 'label') is NaN"),
        (["a", ""], "data.csv:2: the label (column 'label') is empty"),
        (["a", "b", 1], "data.csv:3: label 1 is a whole number, but the first one (data.csv:1) is text"),
        ([1, True], "data.csv:2: label True is true/false"),
        ([1.5], "data.csv:1: label 1.5 is a number with a fraction, not a class; for numbers to predict"),
        ([["a"]], "data.csv:1: label ['a'] is a list"),
        ([{}], "is an object"),
    ],
)
def test_a_label_that_cannot_be_used_is_refused_with_its_row(labels: list[object], says: str) -> None:
    with pytest.raises(DataError) as caught:
        label_cells(rows_of(*labels), "label")
    assert says in str(caught.value)


def test_a_missing_column_names_those_present() -> None:
    rows = Rows([{"labels": "a"}, {"labels": "b", "gold": 1}], source="f.csv", separator=":")
    with pytest.raises(DataError, match=r"f.csv: no column \(task.label\) 'label'. Did you mean 'labels'\?"):
        label_cells(rows, "label")
    with pytest.raises(DataError, match=r"f.csv:1: .*'gold'.* There are: labels"):
        label_cells(rows, "gold")


def test_numbers_may_be_written_as_text() -> None:
    assert label_numbers(rows_of(1, "2.5", 0.25, "-1e-3"), "label") == [1.0, 2.5, 0.25, -0.001]


@pytest.mark.parametrize("label", ["x", "nan", "inf", math.inf, True, [1], 10**400])
def test_what_is_no_number_is_refused_for_regression(label: object) -> None:
    with pytest.raises(DataError, match=r"data.csv:1: label .* is not a number"):
        label_numbers(rows_of(label), "label")


def test_true_and_false_are_the_names_that_say_so_in_any_case_and_order():
    rows = Rows([{"label": True}, {"label": False}], source="data.jsonl")
    assert label_ids([True, False], ["True", "False"], rows) == [0, 1]
    assert label_ids([True, False], ["FALSE", "TRUE"], rows) == [1, 0]
