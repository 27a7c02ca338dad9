from __future__ import annotations

import sys
from contextlib import redirect_stderr
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def rouge_scorer() -> ModuleType:
    """The module of the package rouge-score."""
    # It imports absl, which keeps the stderr it finds and closes it when logging is configured anew: not pytest's.
    with redirect_stderr(sys.__stderr__):
        from rouge_score import rouge_scorer
    return rouge_scorer


@pytest.fixture(scope="session")
def e2e_test(mirror: Path) -> dict[str, list[str]]:
    """Meaning representations of E2E's test split with their references, in order of appearance."""
    import pyarrow.parquet as parquet

    rows = parquet.read_table(mirror / "datasets/tuetschek/e2e_nlg/default/test-00000-of-00001.parquet").to_pylist()
    references: dict[str, list[str]] = {}
    for row in rows:
        references.setdefault(row["meaning_representation"], []).append(row["human_reference"])
    return references


@pytest.fixture(scope="session")
def e2e_scored(e2e_test: dict[str, list[str]]) -> tuple[list[str], list[list[str]]]:
    """The last reference of each meaning, every seventh word left out, and the other references."""
    texts = [
        " ".join(word for place, word in enumerate(all_[-1].split(), 1) if place % 7) for all_ in e2e_test.values()
    ]
    return texts, [all_[:-1] or all_ for all_ in e2e_test.values()]
