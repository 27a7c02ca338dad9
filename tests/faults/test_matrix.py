"""The fault table is whole, and names tests that exist."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from faults.matrix import MATRIX, Row
from faults.show import verdict_of

ROOT = Path(__file__).parents[2]


@cache
def functions(file: str) -> set[str]:
    return {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_the_table_has_all_rows() -> None:
    assert [row.number for row in MATRIX] == list(range(1, 75))


@pytest.mark.parametrize("row", MATRIX, ids=lambda row: str(row.number))
def test_a_row_names_tests_that_exist_or_says_why_there_are_none(row: Row) -> None:
    assert row.tests or row.instead
    for test in row.tests:
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in functions(file), test


def test_a_row_fails_if_a_test_of_it_fails_or_was_not_run() -> None:
    row = Row(1, "x", ("tests/a.py::test_b[row-1-", "tests/a.py::test_c"))
    done = {"tests/a.py::test_b[row-1-x]": "passed", "tests/a.py::test_b[row-12-x]": "failed"}
    assert verdict_of(row, done) == "not run: tests/a.py::test_c"
    assert verdict_of(row, done | {"tests/a.py::test_c": "passed"}) == "2 passed"
    assert verdict_of(row, done | {"tests/a.py::test_c": "failed"}) == "FAILED tests/a.py::test_c"
    assert verdict_of(Row(2, "y", (), "GPU"), done) == "GPU"
