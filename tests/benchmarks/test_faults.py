"""How outcomes of the same fault are named and summed up."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program() -> dict:
    # Not imported: a folder of tests has its name.
    return runpy.run_path(str(ROOT / "benchmarks" / "faults.py"))


@pytest.mark.parametrize(
    ("code", "said", "equal", "named"),
    [
        (0, "", True, "equal"),
        (0, "", False, "silently different"),
        (2, "lora train: no", False, "refused"),
        (1, "Traceback (most recent call last)", False, "traceback"),
    ],
)
def test_an_outcome_has_a_name(code: int, said: str, equal: bool, named: str, program: dict) -> None:
    assert program["verdict"](code, said, equal=equal) == named


def test_the_page_shows_the_table_of_the_results(program: dict) -> None:
    cases = json.loads(program["RESULTS"].read_text())["cases"]
    assert program["table"](cases) in (ROOT / "docs" / "reliability.md").read_text()
