"""lora export by the real command line: a folder that PEFT loads, and a passport."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from commands.conftest import Finished
from conftest import Completed


@pytest.fixture(scope="module")
def exported(finished: Finished, lora: Callable[..., Completed], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exported") / "adapter"
    words = ("run=latest", "target=peft", f"output={output}")
    process = lora("export", *words, cwd=finished.home, env={**finished.env, "COLUMNS": "100"})
    assert process.returncode == 0, process.stderr
    assert "vllm" in process.stdout
    assert max(map(len, process.stdout.split(str(output))[0].splitlines())) <= 101
    return output


def test_an_export_for_peft_is_the_same_to_the_bit(exported: Path, finished: Finished) -> None:
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (finished.path / "adapter", exported)
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_passport_says_what_was_not_run(exported: Path) -> None:
    passport = json.loads((exported / "passport.json").read_text())
    assert "no engine was run" in passport["source"]
    assert passport["engines"]["peft"]["verdict"] == "loads"
    assert passport["engines"]["vllm"] == {
        "verdict": "refused",
        "why": ["modules_to_save must be null (vllm/lora/peft_helper.py)"],
    }
    assert "whole" in passport["adapter"]


def test_an_exported_run_can_be_scored(exported: Path, finished: Finished, call, monkeypatch) -> None:
    monkeypatch.chdir(finished.home)
    saved = ["model=tiny-bert", "model.random={hidden_size:64}", "task=text_classification", "task.label=verdict"]
    data = ["task.data.train=train.csv", "task.data.validation=validation.csv"]
    answer = call("eval", f"run={exported}", *saved, *data, "output=scored")
    assert answer.code == 0, answer.err
    figures = json.loads((finished.home / "scored" / "metrics.json").read_text())["metrics"]
    shutil.rmtree(finished.home / "scored")
    assert figures["accuracy"] == finished.facts()["metrics"]["validation"]["accuracy"]


def test_loralib_gets_a_file_that_its_loader_reads(finished, call, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(finished.home)
    assert call("export", "run=latest", "target=loralib", f"output={tmp_path / 'l'}").code == 0
    state = torch.load(tmp_path / "l" / "lora.pt", weights_only=True)
    layers = json.loads((tmp_path / "l" / "layers.json").read_text())
    assert {name.removesuffix(".lora_A") for name in state if name.endswith("lora_A")} == set(layers)
    assert "classifier.weight" in state
    assert json.loads((tmp_path / "l" / "passport.json").read_text())["engines"]["loralib"]["verdict"] == "loads"


def test_llamacpp_gets_its_own_file_of_a_llama(talking: Finished, call, monkeypatch, tmp_path) -> None:
    gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    monkeypatch.chdir(talking.home)
    answer = call("export", "run=latest", "target=llamacpp", f"output={tmp_path / 'l'}")
    assert answer.code == 0, answer.err
    assert f"--lora {tmp_path / 'l'}/adapter.gguf" in answer.out.replace("\n", "")
    names = {each.name for each in gguf.GGUFReader(tmp_path / "l" / "adapter.gguf").tensors}
    assert {f"blk.0.attn_{part}.weight.lora_{factor}" for part in "qv" for factor in "ab"} <= names
    assert (tmp_path / "l" / "adapter_model.safetensors").is_file()


def test_without_the_base_models_config_llamacpp_makes_its_file_itself(talking, call, tmp_path) -> None:
    answer = call("export", f"run={talking.path / 'adapter'}", "target=llamacpp", f"output={tmp_path / 'l'}")
    assert answer.code == 0, answer.err
    assert "no adapter.gguf: a bare adapter does not say how many heads its base has; give model=NAME" in answer.err
    assert "python convert_lora_to_gguf.py" in answer.out
    assert not (tmp_path / "l" / "adapter.gguf").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["target=vllm", "output=new"], "modules trained whole (classifier"),
        (["target=onyx", "output=new"], "target=onyx: no such target. Did you mean onnx?"),
        (["target=peft", "output=train.csv"], "exists already"),
        (["target=peft"], "output: needs a value"),
    ],
)
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(words, said, finished, call, monkeypatch) -> None:
    monkeypatch.chdir(finished.home)
    before = set(finished.home.iterdir())
    answer = call("export", "run=latest", *words)
    assert answer.code == 2
    assert said in answer.err
    assert set(finished.home.iterdir()) == before
