"""lora combine by the real command line: the sum is an adapter like any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from commands.conftest import Finished
from conftest import Completed
from lora_cli.nn.stored import read_stored


@pytest.fixture(scope="module")
def combined(finished: Finished, forked: Callable[..., Completed], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("combined") / "adapter"
    words = ("adapters=[latest,latest]", "weights=[1.5,-0.5]", f"output={output}")
    process = forked("combine", *words, cwd=finished.home)
    assert process.returncode == 0, process.stderr
    assert "13 layers, rank 16" in process.stderr
    return output


def test_the_sum_of_an_adapter_with_itself_is_the_adapter(combined: Path, finished: Finished) -> None:
    before, after = read_stored(finished.path / "adapter"), read_stored(combined)
    for name, layer in before.layers.items():
        torch.testing.assert_close(after.layers[name].delta(), layer.delta(), rtol=1e-6, atol=1e-7)


def test_the_folder_says_what_it_is_made_of(combined: Path) -> None:
    assert json.loads((combined / "combined.json").read_text())["weights"] == [1.5, -0.5]


def test_a_combined_adapter_predicts_what_the_run_did(combined: Path, finished: Finished, call, monkeypatch) -> None:
    monkeypatch.chdir(finished.home)
    model = ["model=tiny-bert", "model.random={hidden_size:64}", "task=text_classification"]
    answers = [
        call("infer", run, "text=mmmmmm train 3", *more)
        for run, more in ((f"run={combined}", model), ("run=latest", []))
    ]
    assert [answer.code for answer in answers] == [0, 0]
    ours, theirs = (json.loads(answer.out) for answer in answers)
    assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-4)


def test_a_smaller_rank_says_what_it_keeps(finished, call, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(finished.home)
    answer = call("combine", "adapters=[latest]", "method=svd", "rank=2", f"output={tmp_path / 'c'}")
    assert answer.code == 0
    assert "of the squared norm of the exact sum" in answer.err
    assert {layer.r for layer in read_stored(tmp_path / "c").layers.values()} == {2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["output=c"], "adapters=[]"),
        (["adapters=[latest]", "output=c", "weights=[1,2]"], "one for each of the 1 adapters"),
        (["adapters=[latest]", "output=c", "method=sdv"], "Did you mean svd?"),
        (["adapters=[latest]", "output=c", "rank=3"], "with method=svd"),
        (["adapters=[latest]", "output=c", "head=2"], "from 1 to 1"),
        (["adapters=[latest]", "output=train.csv"], "exists already"),
        (["adapters=[latest]", "output=c", "weights=[0]"], "at least one that is not 0"),
        (["adapters=[latest,nope]", "output=c"], "nope"),
    ],
)
def test_what_makes_no_sum_is_one_line(words, said, finished, call, monkeypatch) -> None:
    monkeypatch.chdir(finished.home)
    answer = call("combine", *words)
    assert answer.code == 2
    assert said in answer.err
    assert len(answer.err.strip().splitlines()) == 1
    assert not (finished.home / "c").exists()
