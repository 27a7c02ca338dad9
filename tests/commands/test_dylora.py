"""One run with lora=dylora, used at every rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands.conftest import FILMS, TINY


@pytest.fixture
def trained(films: Path, call) -> Path:
    answer = call("train", *TINY, *FILMS, "lora=dylora", "lora.r=4", "train.max_steps=6")
    assert answer.code == 0, answer.err
    return Path("runs/latest")


def figures(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())["metrics"]


def test_run_is_scored_merged_and_exported_at_a_rank(trained: Path, call) -> None:
    answer = call("eval", "run=latest", "lora.r=1,4", "hydra.sweep.dir=ranks")
    assert answer.code == 0, answer.err
    whole = json.loads((trained / "run.json").read_text())["metrics"]["validation"]
    assert figures(Path("ranks/1")) == whole
    assert figures(Path("ranks/0"))["loss"] != whole["loss"]
    for words in (["eval"], ["export", "target=peft", "output=one"], ["merge", "output=plain", "rows=8"]):
        answer = call(*words, "run=latest", "lora.r=1")
        assert answer.code == 0, answer.err
    assert figures(trained / "eval/validation-r1") == figures(Path("ranks/0"))
    found = [call("infer", "run=latest", "text=a fine film", *rank).out for rank in ([], ["lora.r=4"], ["lora.r=1"])]
    assert found[0] == found[1] != found[2]
    assert json.loads(Path("one/adapter_config.json").read_text())["r"] == 1


def test_rank_that_was_not_trained_is_refused(trained: Path, call) -> None:
    assert "lora.r=8: at most 4, the rank that was trained" in call("eval", "run=latest", "lora.r=8").err
    assert "lora.r=0" in call("eval", "run=latest", "lora.r=0").err
