"""run.json comes from anybody: any JSON is read, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.errors import RunError, UserError
from lora_cli.runs.directory import RunDirectory, read_saved_config
from lora_cli.runs.facts import _FIELDS, checked_facts

FINISHED = {
    "format": 1,
    "status": "finished",
    "signature": "1a2b3c4d",
    "data": {"validation": {"rows": 30, "fingerprint": "00", "truncated": 0}},
    "metrics": {"validation": {"accuracy": 0.5, "f1": None}},
    "labels": ["a", "b"],
    "base": {"name": "x", "revision": None, "fingerprint": "00"},
    "best_step": None,
    "eval_batch_size": 64,
}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(_FIELDS)), ANYTHING, max_size=3), whole=st.none() | ANYTHING)
def test_any_json_is_read_or_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, changes, whole) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.json").write_text(json.dumps(FINISHED | changes if whole is None else whole))
    (folder / "config.yaml").write_text("task: {name: x}")
    for read in (RunDirectory(folder).facts, lambda: read_saved_config(folder)):
        refusal = ""
        try:
            read()
        except UserError as error:
            refusal = str(error).replace(str(folder), "run")
        assert len(refusal.splitlines()) <= 1
        assert len(refusal) < 300


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 100_000, "1e999", "NaN", '{"format": 1, "format": 1}', "\ud800"])
def test_json_beyond_what_python_reads_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(f'{{"format": 1, "steps": {text}}}'.encode("utf-8", "surrogatepass"))
    with pytest.raises(RunError):
        RunDirectory(tmp_path).facts()


def test_keys_of_other_versions_do_no_harm() -> None:
    assert checked_facts(FINISHED | {"invented_later": [1]}, "run") == FINISHED


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("labels", 5),
        ("labels", ["a", 1]),
        ("init_seed", "7"),
        ("init_seed", -1),
        ("eval_batch_size", 0),
        ("eval_batch_size", True),
        ("eval_batch_size", 10**18),
        ("data", [1]),
        ("data", {"validation": {"rows": "many", "fingerprint": "0"}}),
        ("data", {"validation": {"rows": 3}}),
        ("metrics", {"validation": {"accuracy": "0.5"}}),
        ("metrics", {"validation": {"accuracy": 10**400}}),
        ("status", ["finished"]),
        ("base", None),
    ],
)
def test_a_value_that_is_not_what_its_key_holds_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(RunError, match=f"run: run.json has {key}="):
        checked_facts(FINISHED | {key: value}, "run")


@pytest.mark.parametrize("key", ["status", "data", "metrics", "signature"])
def test_a_finished_run_has_its_figures(key: str) -> None:
    with pytest.raises(RunError, match=f"no {key}"):
        checked_facts({name: value for name, value in FINISHED.items() if name != key}, "run")
