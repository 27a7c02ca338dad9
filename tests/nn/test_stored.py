"""An adapter read without its model says what the model computes with, and is written back as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_cli.errors import AdapterError
from lora_cli.nn.inject import adapted_layers, inject
from lora_cli.nn.stored import Factors, read_stored, short_name, targets_of
from lora_cli.spec import LoraSpec

from .adapters import adapted_lm, saved, stored
from .models import lm_logits, tiny_lm

SPECS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"scaling": "alpha/sqrt(r)"},
    "dora": {"variant": "dora"},
    "patterns": {"rank_pattern": {"re:.*\\.0\\..*": 2}, "alpha_pattern": {"q_proj": 3.0}},
    "embedding": {"targets": ["embed_tokens", "v_proj"]},
    "biases": {"bias": "all", "family": "qwen2"},
    "parts": {"targets": ["c_attn:q+v", "mlp.c_fc"], "family": "gpt2"},
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_deltas_without_the_model_are_those_of_its_layers(spec: dict[str, Any], tmp_path: Path) -> None:
    model = adapted_lm(tmp_path / "a", **spec)
    adapter = read_stored(tmp_path / "a")
    layers = adapted_layers(model)
    assert set(adapter.layers) == set(layers)
    for name, layer in adapter.layers.items():
        torch.testing.assert_close(layer.delta().float(), layers[name].delta_matrix().detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_what_is_written_back_holds_the_same_bytes_of_tensors(spec: dict[str, Any], tmp_path: Path) -> None:
    adapter = stored(tmp_path / "a", **spec)
    saved(adapter, tmp_path / "b")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / "b" / "lora.json").read_text())["fingerprint"] == "f"


def test_groups_of_a_convolution_are_blocks_of_its_update() -> None:
    A, B = torch.randn(4, 3, 2, 2), torch.randn(6, 2, 1, 1)
    layer = Factors(A, B, 0.5)
    x = torch.randn(1, 3, 5, 5)
    expected = 0.5 * torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, A), B, groups=2)
    weight = layer.delta().float().view(6, 3, 2, 2)
    torch.testing.assert_close(torch.nn.functional.conv2d(x, weight), expected, rtol=1e-4, atol=1e-5)


def rewrite(folder: Path, **tensors: torch.Tensor) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | tensors, file)


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
FAULTS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "another rank": ({f"{LAYER}.lora_A.weight": torch.zeros(3, 16)}, "no factors of rank 4"),
    "not finite": ({f"{LAYER}.lora_A.weight": torch.full((4, 16), torch.nan)}, "NaN or infinity"),
    "twice": ({f"{LAYER}.lora_A.default.weight": torch.zeros(4, 16)}, "two factors A"),
    "half a pair": ({"base_model.model.x.lora_B.weight": torch.zeros(4, 4)}, "a factor B only"),
    "another method": ({f"{LAYER}.lora_E": torch.zeros(4)}, "no tensor of LoRA or DoRA"),
    "magnitude without DoRA": ({f"{LAYER}.lora_magnitude_vector": torch.zeros(16)}, "do not agree"),
}


@pytest.mark.parametrize(("tensors", "said"), FAULTS.values(), ids=FAULTS)
def test_what_does_not_fit_is_refused_by_name(tensors: dict[str, Any], said: str, tmp_path: Path) -> None:
    adapted_lm(tmp_path / "a")
    rewrite(tmp_path / "a", **tensors)
    with pytest.raises(AdapterError, match=said):
        read_stored(tmp_path / "a")


def test_a_model_trained_whole_has_no_update(tmp_path: Path) -> None:
    adapted_lm(tmp_path / "a", variant="full", targets=[])
    with pytest.raises(AdapterError, match="trained whole"):
        read_stored(tmp_path / "a")


def test_parts_that_do_not_fit_the_factors_are_refused(tmp_path: Path) -> None:
    adapted_lm(tmp_path / "a", targets=["c_attn:q+v"], family="gpt2")
    facts = json.loads((tmp_path / "a" / "lora.json").read_text())
    next(iter(facts["parts"]["layers"].values()))["names"].append("k")
    (tmp_path / "a" / "lora.json").write_text(json.dumps(facts))
    with pytest.raises(AdapterError, match="do not fit"):
        read_stored(tmp_path / "a")


def test_written_ranks_and_scalings_are_read_again_as_they_are(tmp_path: Path) -> None:
    adapter = stored(tmp_path / "a")
    layers = {
        name: Factors(torch.randn(1 + number, 16), torch.randn(16, 1 + number), 0.3 + number)
        for number, name in enumerate(adapter.layers)
        if name.endswith("q_proj")
    }
    again = read_stored(saved(adapter.with_layers(layers), tmp_path / "b"))
    assert {name: (layer.r, round(layer.scaling, 9)) for name, layer in again.layers.items()} == {
        name: (layer.r, round(layer.scaling, 9)) for name, layer in layers.items()
    }


def test_targets_of_several_adapters_match_their_layers_and_no_others(tmp_path: Path) -> None:
    one, other = stored(tmp_path / "a", targets=["q_proj"]), stored(tmp_path / "b", targets=["1.mlp.down_proj"])
    targets = targets_of([one, other])
    model = tiny_lm("llama")
    inject(model, LoraSpec(targets=list(targets), r=2), groups={})
    assert sorted(adapted_layers(model)) == sorted({**one.layers, **other.layers})
    assert lm_logits(model).isfinite().all()


def test_short_names_leave_out_what_all_share() -> None:
    names = ["a.b.0.query", "a.b.1.query"]
    assert [short_name(name, names) for name in names] == ["0.query", "1.query"]
    assert short_name("head", ["head"]) == "head"
