"""lora merge by the real command line: a folder that transformers loads, and what it says of the difference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from commands.conftest import Finished, read_jsonl
from conftest import Completed


@pytest.fixture(scope="module")
def merged(finished: Finished, forked: Callable[..., Completed], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("merged") / "model"
    process = forked("merge", "run=latest", f"output={output}", "shard_size=1MB", cwd=finished.home)
    assert process.returncode == 0, process.stderr
    assert "of 30 predictions change" in process.stderr
    return output


def test_transformers_predicts_with_the_folder_what_the_run_predicted(merged: Path, finished: Finished) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    texts = [line.split(",")[1] for line in (finished.home / "validation.csv").read_text().splitlines()[1:]]
    with torch.no_grad():
        probabilities = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(-1)
    rows = read_jsonl(finished.path / "predictions" / "validation.jsonl")
    assert [model.config.id2label[int(row.argmax())] for row in probabilities] == [row["prediction"] for row in rows]
    found = torch.tensor([row["probability"] for row in rows])
    torch.testing.assert_close(probabilities.max(-1).values, found, atol=1e-5, rtol=0)
    assert not any("lora" in name.lower() for name, _ in model.named_parameters())


def test_the_certificate_is_about_real_rows_in_every_dtype(merged: Path) -> None:
    certificate = json.loads((merged / "certificate.json").read_text())
    assert certificate["rows"] == 30
    exact, coarse = certificate["dtypes"]["fp32"], certificate["dtypes"]["bf16"]
    assert exact["predictions"] == 30
    assert exact["changed"] == 0
    assert exact["largest_difference"] < 1e-5 < coarse["largest_difference"]


@pytest.mark.parametrize(("dtype", "wanted"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_stored_as_asked(dtype, wanted, finished, call, monkeypatch, tmp_path) -> None:
    from safetensors.torch import load_file

    monkeypatch.chdir(finished.home)
    assert call("merge", "run=latest", f"output={tmp_path / 'm'}", f"dtype={dtype}", "rows=0").code == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "m" / "model.safetensors").values()} == {wanted}
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")


def test_nothing_is_overwritten(finished, call, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(finished.home)
    (tmp_path / "here").mkdir()
    answer = call("merge", "run=latest", f"output={tmp_path / 'here'}")
    assert answer.code == 2
    assert "exists already" in answer.err
    assert not any((tmp_path / "here").iterdir())


@pytest.mark.parametrize("word", ["dtype=int8", "shard_size=5", "rows=-1"])
def test_wrong_settings_are_one_line(word, finished, call, monkeypatch) -> None:
    monkeypatch.chdir(finished.home)
    answer = call("merge", "run=latest", "output=m", word)
    assert answer.code == 2
    assert len(answer.err.strip().splitlines()) == 1
