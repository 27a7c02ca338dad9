"""Text that is written, by the real command line: train, eval, and what stays on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from commands.conftest import Finished, read_jsonl
from conftest import Completed

COLOURS = ("red", "blue", "green", "grey")
SMALL = (
    "task=text_generation",
    "task.data.train=train.jsonl",
    "task.data.validation=validation.jsonl",
    "task.prompt=A {colour} {thing}:{eos}",
    "task.target={sentence}",
    "task.group=thing",
    "task.metrics=[bleu,rougeL,exact_match,perplexity]",
    "task.decode.max_new_tokens=24",
    "train.lr=1e-2",
    "train.batch_size=8",
    "lora.targets=[all-linear]",
    "device.threads=1",
)


def write_things(folder: Path) -> None:
    """Sentences of a thing and its colour; in validation two references each, one of them in a list."""
    for split, things in (("train", ("hat", "car", "cup")), ("validation", ("hat", "car"))):
        rows = [
            {"colour": colour, "thing": thing, "sentence": f"the {thing} is {colour}"}
            if split == "train"
            else {"colour": colour, "thing": thing, "sentence": [f"the {thing} is {colour}", f"a {colour} {thing}"]}
            for thing in things
            for colour in COLOURS
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module", params=["tiny-gpt2", "tiny-t5"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, forked: Callable[..., Completed]):
    home = tmp_path_factory.mktemp(request.param)
    write_things(home)
    process = forked("train", f"model={request.param}", *SMALL, "train.epochs=3", cwd=home)
    assert process.returncode == 0, process.stderr
    return Finished(home, (home / "runs" / "latest").resolve(), process, {})


def test_the_run_holds_metrics_by_group_and_the_loss_that_chose_the_best_weights(written: Finished) -> None:
    facts = written.facts()
    found = facts["metrics"]["validation"]
    assert {"bleu", "rougeL", "exact_match", "bleu/hat", "bleu/car", "perplexity", "loss"} <= found.keys()
    scored = [row for row in read_jsonl(written.path / "metrics.jsonl") if "validation/loss" in row]
    assert found["loss"] == min(row["validation/loss"] for row in scored)
    assert "validation/bleu" not in scored[0]
    assert facts["labels"] is None


def test_each_prompt_is_answered_once_and_kept_with_its_references(written: Finished) -> None:
    rows = read_jsonl(written.path / "predictions" / "validation.jsonl")
    assert len(rows) == 8
    assert rows[0]["prompt"] == "A red hat:"
    assert rows[0]["references"] == ["the hat is red", "a red hat"]
    assert rows[0]["group"] == "hat"
    assert isinstance(rows[0]["prediction"], str)


def test_eval_gives_the_same_figures_to_the_last_digit(written: Finished, forked: Callable[..., Completed]) -> None:
    process = forked("eval", "run=latest", cwd=written.home)
    assert process.returncode == 0, process.stderr
    found = json.loads((written.path / "eval" / "validation" / "metrics.json").read_text())["metrics"]
    assert found == written.facts()["metrics"]["validation"]


def test_the_adapter_says_what_it_is_for(written: Finished) -> None:
    config = json.loads((written.path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == ("SEQ_2_SEQ_LM" if "t5" in written.path.name else "CAUSAL_LM")
    card = (written.path / "adapter" / "README.md").read_text()
    assert "text-classification" not in card
