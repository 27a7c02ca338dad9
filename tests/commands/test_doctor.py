"""lora doctor: a table, or lines of JSON; fails only where nothing can be trained."""

from __future__ import annotations

import json

import pytest

from lora_cli.commands import doctor
from lora_cli.health import PROBLEM, Finding


def test_a_table_names_what_was_looked_at(call) -> None:
    answer = call("doctor")
    assert answer.code == 0, answer.err
    assert {"python", "torch", "libraries", "machine", "runs", "hub", "mirror"} <= set(answer.out.split())


def test_findings_come_as_json_too(call) -> None:
    found = [json.loads(line) for line in call("doctor", "--json").out.splitlines()]
    assert {"name", "state", "text", "mend", "stops_training"} == set(found[0])
    assert "torch" in [each["name"] for each in found]


@pytest.mark.parametrize(("stops", "code"), [(True, 1), (False, 0)])
def test_the_exit_code_tells_whether_anything_can_be_trained(stops: bool, code: int, call, monkeypatch) -> None:
    finding = Finding("torch", PROBLEM, "is [broken]", "pip install torch", stops)
    monkeypatch.setattr(doctor, "examine", lambda: iter([finding]))
    answer = call("doctor")
    assert answer.code == code
    assert [*map(str.strip, answer.out.strip().splitlines())] == ["problem  torch  is [broken]", "pip install torch"]
    assert (
        answer.err
        == "lora doctor: nothing can be trained here: torch: is [broken]; to mend it: pip install torch\n" * code
    )
