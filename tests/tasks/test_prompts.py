"""Templates: what stands in a cell is text, whatever it looks like."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.errors import DataError
from lora_cli.tasks.prompts import Prompt, Template, cell_text, clean, reformatted
from tasks.readers import rows_of

ALPACA = Template("Do {what}.[[ With {input}!]]\n", "task.prompt")


def test_a_part_is_left_out_where_its_cell_is_empty_or_missing() -> None:
    assert ALPACA.render({"what": "it", "input": "care"}, "here").text == "Do it. With care!\n"
    for row in ({"what": "it", "input": ""}, {"what": "it", "input": None}, {"what": "it"}):
        assert ALPACA.render(row, "here").text == "Do it.\n"
    assert ALPACA.columns == ("what", "input")
    assert ALPACA.required == ("what",)


def test_the_end_mark_is_no_text() -> None:
    prompt = Template("{a}{eos}", "task.prompt").render({"a": "x{eos}"}, "here")
    assert prompt == Prompt("x{eos}", ((0, 6),), ends=True)


@settings(max_examples=80, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_cells_stand_where_the_prompt_says(a: str, b: str) -> None:
    prompt = Template("<{a}[{b}]{a}{a.b}{0}>", "task.prompt").render({"a": a, "b": b, "a.b": "d", "0": "e"}, "here")
    assert prompt.text == f"<{a}[{b}]{a}de>"
    assert [prompt.text[start:end] for start, end in prompt.cells] == [a, b, a, "d", "e"]


@pytest.mark.parametrize("cell", ["{b}", "{b.__class__}", "{0}", "[[{b}]]", "{eos}", "{{b}}", "%s", "\\1", "\\g<0>"])
def test_a_cell_is_never_read_as_a_template(cell: str) -> None:
    assert Template("a {a} [[{a}]]", "task.prompt").render({"a": cell, "b": "no"}, "here").text == f"a {cell} {cell}"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"wat": "x"}, "here: no column (task.prompt) 'what'. Did you mean 'wat'?"),
        ({"what": None}, "here: column 'what' holds null, not text"),
        ({"what": 3}, "here: column 'what' holds int, not text"),
        ({"what": "x", "input": 3}, "here: column 'input' holds int, not text"),
    ],
)
def test_a_cell_that_is_no_text_is_named(row: dict, says: str) -> None:
    with pytest.raises(DataError) as caught:
        ALPACA.render(row, "here")
    assert str(caught.value).startswith(says)


def test_half_a_character_is_replaced() -> None:
    assert clean("a\ud83db") == "a\ufffdb"
    assert cell_text({"a": "\udc00"}, "a", "task.text", "here") == "\ufffd"


def test_columns_are_left_as_they_are() -> None:
    rows = rows_of({"a": 1})
    assert reformatted(rows, "columns") is rows


E2E = {"meaning_representation": "name[The Eagle], food[Fast food]", "human_reference": "It is quick."}
TRIPLES = {
    "modified_triple_sets": {"mtriple_set": [["Aarhus | leader | Jacob"]]},
    "lex": {"comment": ["good", "bad"], "text": ["One.", "Two."]},
    "category": "Airport",
}
DART = {"tripleset": [["A", "IN", "B"]], "annotations": {"text": ["a is in b", "b has a"], "source": ["x", "y"]}}


@pytest.mark.parametrize(
    ("name", "row", "target"),
    [("e2e", E2E, "It is quick."), ("webnlg", TRIPLES, ["One."]), ("dart", DART, ["a is in b", "b has a"])],
)
def test_structured_data_becomes_input_and_target(name: str, row: dict, target: object) -> None:
    made = reformatted(rows_of(row), name)
    assert made[0]["target"] == target
    assert isinstance(made[0]["input"], str)
    assert made.where(0) == "data.jsonl:1"


def test_what_is_not_of_the_formats_shape_is_named() -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:2: column 'tripleset' is not of the shape"):
        reformatted(rows_of(DART, {"tripleset": 3}), "dart")
    with pytest.raises(DataError, match=r"data\.jsonl:1: no column \(task\.format=dart\) 'tripleset'.*'triplesets'"):
        reformatted(rows_of({"triplesets": []}), "dart")


def test_triples_typed_as_a_line_are_taken_as_they_are() -> None:
    assert reformatted(rows_of({"tripleset": "A : in : B"}), "dart")[0]["input"] == "A : in : B"
