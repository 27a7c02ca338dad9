"""lora export target=onnx by the real command line: a file that onnxruntime computes with as torch did."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from commands.conftest import Finished, read_jsonl

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")


class NotANumber(torch.nn.Module):
    """What an exporter that took a wrong turn might write."""

    def forward(self, input_ids: torch.Tensor, **batch: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.full((len(input_ids), 3), float("nan")))


@pytest.fixture
def written(finished: Finished, call, monkeypatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(finished.home)
    answer = call("export", "run=latest", "target=onnx", f"output={tmp_path / 'o'}")
    assert answer.code == 0, answer.err
    assert "0 of 30 predictions change" in answer.err
    assert len(answer.err.splitlines()) == 3, "nothing of what the exporter says"
    return tmp_path / "o"


def test_onnxruntime_predicts_with_the_folder_what_the_run_predicted(written: Path, finished: Finished) -> None:
    from transformers import AutoConfig, AutoTokenizer

    session = onnxruntime.InferenceSession(written / "model.onnx")
    tokenizer, config = AutoTokenizer.from_pretrained(written), AutoConfig.from_pretrained(written)
    texts = [line.split(",")[1] for line in (finished.home / "validation.csv").read_text().splitlines()[1:]]
    (logits,) = session.run(["logits"], dict(tokenizer(texts, padding=True, return_tensors="np")))
    rows = read_jsonl(finished.path / "predictions" / "validation.jsonl")
    assert [config.id2label[int(row.argmax())] for row in logits] == [row["prediction"] for row in rows]
    (alone,) = session.run(["logits"], dict(tokenizer(texts[:1], return_tensors="np")))
    assert abs(alone[0] - logits[0]).max() < 1e-5, "both axes are free"

    certificate = json.loads((written / "certificate.json").read_text())
    assert certificate["rows"] == certificate["dtypes"]["fp32"]["predictions"] == 30
    assert certificate["dtypes"]["fp32"]["largest_difference"] < 1e-5
    assert certificate["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    assert b"site-packages" not in (written / "model.onnx").read_bytes()


def test_a_decoder_that_writes_gives_the_logits_of_every_token(talking, call, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(talking.home)
    answer = call("export", "run=latest", "target=onnx", f"output={tmp_path / 'o'}", "task.split=validation", "rows=4")
    assert answer.code == 0, answer.err
    found = json.loads((tmp_path / "o" / "certificate.json").read_text())["dtypes"]["fp32"]
    assert found["changed"] == 0
    assert found["largest_difference"] < 1e-5


def test_logits_that_differ_are_an_error_and_leave_nothing(finished, call, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(finished.home)
    monkeypatch.setattr("lora_cli.onnx_file.save_onnx", lambda model, file, inputs: None)
    monkeypatch.setattr("lora_cli.onnx_file.OnnxModel", lambda file: NotANumber())
    answer = call("export", "run=latest", "target=onnx", f"output={tmp_path / 'o'}")
    assert answer.code == 2
    assert "logits differ by nan from torch's; nothing written" in answer.err
    assert list(tmp_path.iterdir()) == []


def test_encoder_decoders_that_write_are_refused(films: Path, call) -> None:
    task = ["task=text_generation", "task.prompt={text}", "task.target={verdict}", "task.data.train=train.csv"]
    assert call("train", *task, "model=tiny-t5", "train.max_steps=1").code == 0
    answer = call("export", "run=latest", "target=onnx", "output=o")
    assert answer.code == 2
    assert "target=onnx: not of encoder-decoders that write (t5)" in answer.err
    assert not Path("o").exists()


def test_a_bare_adapter_needs_a_task(finished, call) -> None:
    answer = call("export", f"run={finished.path / 'adapter'}", "target=onnx", "output=o")
    assert answer.code == 2
    assert "task: target=onnx needs the whole model, and a bare adapter does not say; give task=NAME" in answer.err


def test_missing_packages_are_one_line_that_names_the_extra(finished, call, monkeypatch) -> None:
    monkeypatch.chdir(finished.home)
    known = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "onnx" else known(name, *rest))
    answer = call("export", "run=latest", "target=onnx", "output=o")
    assert answer.code == 2
    assert answer.err == "lora export: target=onnx: needs packages: pip install 'lora-cli[onnx]'\n"


@pytest.mark.parametrize("word", ["task=support_intents", "model=tiny-bert", "force_base=True"])
def test_what_only_the_whole_model_needs_is_refused_elsewhere(word, finished, call, monkeypatch) -> None:
    monkeypatch.chdir(finished.home)
    answer = call("export", "run=latest", "target=peft", "output=o", word)
    assert answer.code == 2
    assert answer.err == f"lora export: {word}: target=peft does not look at it\n"
