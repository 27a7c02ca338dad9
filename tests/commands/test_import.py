"""lora import by the real command line: files of loralib, PEFT and torchtune become adapter folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from commands.conftest import MODEL, Finished
from conftest import Completed
from lora_cli.nn.stored import read_stored


@pytest.fixture(scope="module")
def imported(finished: Finished, forked: Callable[..., Completed], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run, exported for loralib and taken back."""
    folder = tmp_path_factory.mktemp("imported")
    words = ("run=latest", "target=loralib", f"output={folder / 'loralib'}")
    assert forked("export", *words, cwd=finished.home).returncode == 0
    words = (f"source={folder / 'loralib' / 'lora.pt'}", "task_type=SEQ_CLS", "alpha=16", f"output={folder / 'back'}")
    process = forked("import", *MODEL, *words, "modules_to_save=[classifier]", cwd=finished.home)
    assert process.returncode == 0, process.stderr
    assert "in the format of loralib" in process.stderr
    assert "every name and shape" in process.stderr
    return folder / "back"


def test_a_file_of_loralib_comes_back_to_the_bit(imported: Path, finished: Finished) -> None:
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (finished.path / "adapter", imported)
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_report_names_every_tensor(imported: Path) -> None:
    report = json.loads((imported / "import.json").read_text())
    layer = "bert.encoder.layer.0.attention.self.query"
    assert {"source": f"{layer}.lora_A", "name": f"{layer}.A", "shape": [8, 64]} in report["tensors"]
    assert len(report["tensors"]) == len(load_file(imported / "adapter_model.safetensors"))


def test_peft_in_a_pickle_becomes_peft_in_safetensors(finished, call, tmp_path) -> None:
    source = tmp_path / "pickled"
    source.mkdir()
    torch.save(load_file(finished.path / "adapter" / "adapter_model.safetensors"), source / "adapter_model.bin")
    config = finished.path / "adapter" / "adapter_config.json"
    (source / "adapter_config.json").write_bytes(config.read_bytes())
    answer = call("import", f"source={source}", "output=out")
    assert answer.code == 0, answer.err
    before, after = read_stored(finished.path / "adapter"), read_stored(Path("out"))
    assert after.config == before.config
    assert all(torch.equal(after.layers[name].B, layer.B) for name, layer in before.layers.items())


def test_torchtune_is_checked_against_the_model(call, tmp_path) -> None:
    names = [f"layers.{number}.attn.{kind}_proj.lora_{x}.weight" for number in (0, 1) for kind in "qv" for x in "ab"]
    torch.save({name: torch.randn((2, 64) if ".lora_a." in name else (64, 2)) for name in names}, "adapter.pt")
    sizes = "hidden_size:64,num_attention_heads:4,num_key_value_heads:4,num_hidden_layers:2"
    words = ("model=tiny-llama", f"model.random={{{sizes}}}", "task_type=CAUSAL_LM", "alpha=4")
    answer = call("import", "source=adapter.pt", *words, "output=out")
    assert answer.code == 0, answer.err
    assert "layers.0.attn.q_proj.lora_a.weight → model.layers.0.self_attn.q_proj.A [2, 64]" in answer.out
    assert len(read_stored(Path("out")).layers) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["source=nope.pt"], "no such file"),
        (["source=."], "none of adapter_model.safetensors"),
        (["source=lora.pt"], "model: needs a value"),
        (["source=lora.pt", "model=tiny-bert"], "task_type"),
        (["source=lora.pt", "model=tiny-bert", "task_type=SEQ_CLS"], "alpha: needs a value"),
        (["source=lora.pt", "model=tiny-bert", "task_type=SEQ_CLS", "alpha=2"], "no layer of this model"),
        (["source=lora.pt", "format=lorelib"], "Did you mean loralib?"),
        (["source=text.pt"], "not a file of torch.save"),
    ],
)
def test_what_cannot_be_taken_over_is_one_line_and_leaves_nothing(words, said, refused) -> None:
    torch.save({"h.0.q.lora_A": torch.zeros(2, 8), "h.0.q.lora_B": torch.zeros(8, 2)}, "lora.pt")
    Path("text.pt").write_text("hello")
    assert said in refused("import", *words, "output=out")
    assert not Path("out").exists()
