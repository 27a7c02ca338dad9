"""Exported adapters compute what they did, in the settings that each engine reads; the rest is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.errors import AdapterError
from lora_cli.nn.exports import TARGETS, check_target, loralib_state, portable
from lora_cli.nn.passport import ENGINES, LOADS, REFUSED, WRONG, passport, traits
from lora_cli.nn.stored import read_stored
from lora_cli.spec import EXPORT_TARGETS

from .adapters import deltas, peft_logits, saved, stored

PORTABLE: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"scaling": "alpha/sqrt(r)", "alpha": 5.0},
    "rslora, whole alpha": {"scaling": "alpha/sqrt(r)", "alpha": 4.0},
    "patterns": {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"down_proj": 3.0}},
    "rank of the kernels": {"r": 8, "alpha": 16.0},
    "targets by path": {"targets": ["0.mlp.down_proj", "q_proj"]},
}


# PEFT says which layers of such a name have no tensors; engines go by the tensors.
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("spec", PORTABLE.values(), ids=PORTABLE)
def test_peft_computes_the_same_with_what_all_engines_read(spec: dict[str, Any], tmp_path: Path) -> None:
    adapter = stored(tmp_path / "a", **spec)
    result, _ = portable(adapter)
    config = json.loads((saved(result, tmp_path / "b") / "adapter_config.json").read_text())
    assert not {"use_rslora", "rank_pattern", "alpha_pattern"} & config.keys()
    assert config["r"] == 8
    assert type(config["lora_alpha"]) is int
    assert not any("." in target for target in config["target_modules"])
    assert not {"ranks", "alphas", "rslora"} & traits(result).keys()
    for name, delta in deltas(result).items():
        torch.testing.assert_close(delta, adapter.layers[name].delta(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(peft_logits(tmp_path / "b"), peft_logits(tmp_path / "a"), rtol=0, atol=1e-6)


def test_nothing_is_multiplied_where_nothing_has_to_be(tmp_path: Path) -> None:
    adapter = stored(tmp_path / "a", r=8, alpha=16.0)
    result, changes = portable(adapter)
    assert changes == []
    assert all(torch.equal(result.layers[name].B, layer.B) for name, layer in adapter.layers.items())
    padded, changes = portable(stored(tmp_path / "b", r=4, alpha=6.0))
    assert changes == ["rank 4 is filled up with zeros to 8"]
    assert padded.config["lora_alpha"] == 12


def test_what_was_changed_is_said(tmp_path: Path) -> None:
    _, changes = portable(stored(tmp_path / "a", **PORTABLE["patterns"]))
    assert any("multiplied into B, alpha = r = 8" in change for change in changes)
    assert any("rank 1 to 4 is filled up with zeros to 8" in change for change in changes)


NOT_PORTABLE: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"variant": "dora"}, "DoRA"),
    "biases": ({"bias": "all", "family": "qwen2"}, "trained biases"),
    "whole": ({"modules_to_save": ["norm"]}, r"trained whole .*norm"),
}


@pytest.mark.parametrize("target", ["vllm", "sglang", "tgi", "lorax", "llamacpp"])
@pytest.mark.parametrize(("spec", "said"), NOT_PORTABLE.values(), ids=NOT_PORTABLE)
def test_what_an_engine_has_no_place_for_is_refused_by_name(spec: Any, said: str, target: str, tmp_path: Path) -> None:
    adapter = stored(tmp_path / "a", **spec)
    with pytest.raises(AdapterError, match=said):
        check_target(adapter, target)
    check_target(adapter, "peft")


def test_embeddings_go_only_where_they_are_known(tmp_path: Path) -> None:
    adapter = stored(tmp_path / "a", targets=["embed_tokens"])
    check_target(adapter, "vllm")
    with pytest.raises(AdapterError, match="embeddings"):
        check_target(adapter, "tgi")


VERDICTS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "plain": ({}, {"vllm": LOADS, "sglang": LOADS, "tgi": LOADS, "lorax": LOADS, "llamacpp": LOADS}),
    "rslora": ({"scaling": "alpha/sqrt(r)"}, {"vllm": LOADS, "sglang": WRONG, "tgi": LOADS, "llamacpp": WRONG}),
    "ranks": ({"rank_pattern": {"q_proj": 2}}, {"vllm": WRONG, "sglang": REFUSED, "tgi": WRONG, "llamacpp": LOADS}),
    "alphas": ({"alpha_pattern": {"q_proj": 2.0}}, {"vllm": WRONG, "sglang": REFUSED, "tgi": WRONG, "llamacpp": WRONG}),
    "dora": ({"variant": "dora"}, {"vllm": REFUSED, "sglang": REFUSED, "tgi": WRONG, "llamacpp": REFUSED}),
    "whole": ({"modules_to_save": ["norm"]}, {"vllm": REFUSED, "tgi": WRONG, "lorax": WRONG, "llamacpp": REFUSED}),
}


@pytest.mark.parametrize(("spec", "verdicts"), VERDICTS.values(), ids=VERDICTS)
def test_passport_says_what_each_engine_does(spec: dict[str, Any], verdicts: dict[str, str], tmp_path: Path) -> None:
    found = passport(stored(tmp_path / "a", **spec))
    assert {engine: found[engine].verdict for engine in verdicts} == verdicts
    assert found["peft"].verdict == LOADS
    assert found["loralib"].verdict == REFUSED
    assert all(each.why for each in found.values() if each.verdict != LOADS)


@pytest.mark.parametrize("target", [target for target in TARGETS if target not in ("peft", "loralib")])
def test_what_is_exported_for_an_engine_loads_there(target: str, tmp_path: Path) -> None:
    adapter = stored(tmp_path / "a", **PORTABLE["patterns"])
    check_target(adapter, target)
    assert passport(portable(adapter)[0])[target].verdict == LOADS


def test_loralib_gets_its_own_names_and_the_arguments_of_its_layers(tmp_path: Path) -> None:
    adapter = stored(tmp_path / "a", r=2, alpha_pattern={"q_proj": 3.0})
    state, arguments = loralib_state(adapter)
    name = "model.layers.0.self_attn.q_proj"
    assert set(state) == {f"{layer}.lora_{letter}" for layer in adapter.layers for letter in "AB"}
    assert arguments[name] == {"class": "Linear", "r": 2, "lora_alpha": 3}
    delta = 1.5 * state[f"{name}.lora_B"].double() @ state[f"{name}.lora_A"].double()
    torch.testing.assert_close(delta, adapter.layers[name].delta())


def test_parts_become_a_merged_linear_of_loralib(tmp_path: Path) -> None:
    from torch.nn.functional import conv1d

    adapter = stored(tmp_path / "a", family="gpt2", targets=["c_attn:q+v"], r=2)
    state, arguments = loralib_state(adapter)
    name = "transformer.h.0.attn.c_attn"
    assert arguments[name] == {"class": "MergedLinear", "enable_lora": [True, False, True], "r": 2, "lora_alpha": 6}
    # loralib's merge_AB: a grouped convolution over the blocks, put into the rows of the enabled parts.
    A, B = state[f"{name}.lora_A"], state[f"{name}.lora_B"]
    blocks = conv1d(A.unsqueeze(0), B.unsqueeze(-1), groups=2).squeeze(0)
    expected = torch.zeros(48, 16)
    expected[:16], expected[32:] = 3.0 * blocks[:16], 3.0 * blocks[16:]
    torch.testing.assert_close(adapter.layers[name].delta().float(), expected, rtol=1e-5, atol=1e-6)


def test_parts_that_are_no_equal_blocks_are_refused_for_loralib(tmp_path: Path) -> None:
    adapter = stored(tmp_path / "a", family="bloom", targets=["query_key_value:q"], r=2)
    with pytest.raises(AdapterError, match="no three equal blocks"):
        loralib_state(adapter)


def test_every_target_of_the_configuration_has_rules() -> None:
    assert (*TARGETS, "onnx") == EXPORT_TARGETS, "onnx takes the whole model"
    assert ENGINES.keys() == TARGETS.keys()


def test_an_adapter_of_a_head_alone_has_nothing_for_an_engine(tmp_path: Path) -> None:
    adapter = stored(tmp_path / "a", targets=["q_proj"])
    with pytest.raises(AdapterError, match="no layer is adapted"):
        check_target(adapter.with_layers({}), "vllm")
    assert read_stored(tmp_path / "a").layers
