"""Adapters of other libraries compute here what they compute there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_cli.errors import AdapterError, ConfigError
from lora_cli.nn.adapter import load_adapter
from lora_cli.nn.exports import loralib_state
from lora_cli.nn.imports import format_of, from_loralib, from_torchtune
from lora_cli.nn.inject import adapted_layers

from .adapters import deltas, peft_logits, saved, stored
from .models import lm_logits, tiny, tiny_lm


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_linear_layer_of_loralib_is_scaled_by_its_alpha() -> None:
    name = "model.layers.1.self_attn.v_proj"
    A, B = noise(2, 16), noise(8, 2)
    mapped = from_loralib({f"{name}.lora_A": A, f"{name}.lora_B": B}, tiny_lm("llama"), alpha=5.0)
    torch.testing.assert_close(deltas(mapped.stored)[name], 2.5 * (B @ A).double(), rtol=1e-6, atol=1e-6)
    assert mapped.report == ((f"{name}.lora_A", f"{name}.A", (2, 16)), (f"{name}.lora_B", f"{name}.B", (8, 2)))


@pytest.mark.parametrize("enable", [[True, False, True], [False, True, False], [True, True, True]], ids=str)
def test_a_merged_linear_of_loralib_computes_the_same_here_and_in_peft(enable: list[bool], tmp_path: Path) -> None:
    k, name = sum(enable), "transformer.h.1.attn.c_attn"
    A, B = noise(2 * k, 16), noise(16 * k, 2)
    mapped = from_loralib({f"{name}.lora_A": A, f"{name}.lora_B": B}, tiny_lm("gpt2"), alpha=3.0, enable_lora=enable)
    # loralib's merge_AB and zero_pad.
    delta = torch.zeros(3, 16, 16).double()
    delta[torch.tensor(enable)] = functional.conv1d(A.double()[None], B.double()[:, :, None], groups=k)[0].view(
        k, 16, 16
    )
    expected = tiny_lm("gpt2").double()
    with torch.no_grad():
        expected.get_submodule(name).weight += 1.5 * delta.flatten(0, 1).T
    saved(mapped.stored, tmp_path / "a")
    ours = tiny_lm("gpt2")
    load_adapter(ours, tmp_path / "a", fresh=(), fingerprint=None)
    torch.testing.assert_close(lm_logits(ours.double()), lm_logits(expected), rtol=0, atol=1e-6)
    torch.testing.assert_close(peft_logits(tmp_path / "a", "gpt2"), lm_logits(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"family": "gpt2", "targets": ["c_attn:q+v"]},
        {"targets": ["embed_tokens"]},
        {"bias": "all", "family": "qwen2"},
    ],
    ids=["linear", "parts", "embedding", "biases"],
)
def test_what_we_export_for_loralib_comes_back(spec: dict[str, object], tmp_path: Path) -> None:
    family = str(spec.get("family", "llama"))
    adapter = stored(tmp_path / "a", **spec)
    mapped = from_loralib(loralib_state(adapter)[0], tiny_lm(family), alpha=6.0, enable_lora=[True, False, True])
    assert deltas(mapped.stored).keys() == deltas(adapter).keys()
    for name, delta in deltas(mapped.stored).items():
        torch.testing.assert_close(delta, deltas(adapter)[name])
    other = tiny_lm(family)
    load_adapter(other, saved(mapped.stored, tmp_path / "b"), fresh=(), fingerprint=None)
    torch.testing.assert_close(peft_logits(tmp_path / "a", family), lm_logits(other.double()), rtol=0, atol=1e-6)


def test_a_classifier_of_loralib_brings_its_head(tmp_path: Path) -> None:
    name = "bert.encoder.layer.0.attention.self.query"
    tensors = {
        f"{name}.lora_A": noise(2, 16), f"{name}.lora_B": noise(16, 2),
        "classifier.weight": noise(3, 16), "classifier.bias": noise(3),
    }  # fmt: skip
    with pytest.raises(AdapterError, match=r"modules_to_save=\[classifier\]"):
        from_loralib(tensors, tiny("bert"), alpha=2.0)
    mapped = from_loralib(tensors, tiny("bert"), alpha=2.0, modules_to_save=["classifier"])
    model = tiny("bert")
    load_adapter(model, saved(mapped.stored, tmp_path / "a"), fresh=["classifier"], fingerprint=None)
    assert torch.equal(model.get_parameter("classifier.weight"), tensors["classifier.weight"])
    assert list(adapted_layers(model)) == [name]


LAYER = "model.layers.0.self_attn.q_proj"
LORALIB: dict[str, tuple[Mapping[str, Tensor], str]] = {
    "another model's name": ({"h.0.q.lora_A": noise(2, 16), "h.0.q.lora_B": noise(16, 2)}, "no layer of this model"),
    "half": ({f"{LAYER}.lora_A": noise(2, 16)}, "two matrices A and B"),
    "no layer with a weight": ({"model.lora_A": noise(2, 16), "model.lora_B": noise(16, 2)}, "only linear layers"),
    "a base weight": (
        {f"{LAYER}.lora_A": noise(2, 16), f"{LAYER}.lora_B": noise(16, 2), f"{LAYER}.weight": noise(16, 16)},
        "no factor and no bias",
    ),
    "a bias of another shape": (
        {f"{LAYER}.lora_A": noise(2, 16), f"{LAYER}.lora_B": noise(16, 2), f"{LAYER}.bias": noise(4)},
        "no such parameter",
    ),
}


@pytest.mark.parametrize(("tensors", "said"), LORALIB.values(), ids=LORALIB)
def test_nothing_in_a_loralib_file_is_guessed(tensors: Mapping[str, Tensor], said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        from_loralib(tensors, tiny_lm("llama"), alpha=2.0)


@pytest.mark.parametrize("enable", [[], [True, False, False], [True, True], [True] * 4], ids=str)
def test_a_merged_linear_needs_to_be_said(enable: list[bool]) -> None:
    name = "transformer.h.0.attn.c_attn"
    with pytest.raises(ConfigError, match="enable_lora"):
        from_loralib(
            {f"{name}.lora_A": noise(4, 16), f"{name}.lora_B": noise(32, 2)},
            tiny_lm("gpt2"),
            alpha=2.0,
            enable_lora=enable,
        )


def in_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """torchtune's hf_to_tune: transformers' halves of a head's outputs, taken in turns."""
    return weight.view(num_heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


TUNE = {"q_proj": "attn.q_proj", "k_proj": "attn.k_proj", "o_proj": "attn.output_proj", "gate_proj": "mlp.w1"}
TUNE |= {"down_proj": "mlp.w2", "up_proj": "mlp.w3"}


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_torchtune_comes_out_in_our_names_and_order(family: str, variant: str, tmp_path: Path) -> None:
    adapter = stored(tmp_path / "a", family=family, targets=[*TUNE], variant=variant)
    heads = {"q_proj": 4, "k_proj": 2}
    tensors = {}
    for name, layer in adapter.layers.items():
        _, _, number, *_, last = name.split(".")
        base = f"layers.{number}.{TUNE[last]}"
        tensors[f"{base}.lora_a.weight"] = layer.A
        tensors[f"{base}.lora_b.weight"] = in_pairs(layer.B, heads[last]) if last in heads else layer.B
        if name in adapter.magnitudes:
            m = adapter.magnitudes[name]
            tensors[f"{base}.magnitude"] = in_pairs(m, heads[last]) if last in heads else m
    mapped = from_torchtune(tensors, tiny_lm(family), alpha=6.0)
    saved(mapped.stored, tmp_path / "b")
    torch.testing.assert_close(peft_logits(tmp_path / "b", family), peft_logits(tmp_path / "a", family), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "tensors", "said"),
    [
        ("qwen2", {}, "llama and mistral only, not for qwen2"),
        ("llama", {"layers.0.norm.scale": noise(16)}, "no factor of torchtune"),
        ("llama", {f"layers.0.attn.pos.lora_{x}.weight": noise(2, 2) for x in "ab"}, "no layer that torchtune adapts"),
        ("llama", {f"layers.9.attn.q_proj.lora_{x}.weight": noise(16, 16) for x in "ab"}, "no layer of this model"),
    ],
    ids=["family", "norm", "name", "depth"],
)
def test_nothing_in_a_torchtune_file_is_guessed(family: str, tensors: dict[str, Tensor], said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        from_torchtune(tensors, tiny_lm(family), alpha=2.0)


def test_names_tell_the_library() -> None:
    assert format_of(["base_model.model.a.lora_A.weight"]) == "peft"
    assert format_of(["a.lora_A", "a.lora_B"]) == "loralib"
    assert format_of(["layers.0.attn.q_proj.lora_a.weight"]) == "torchtune"
    with pytest.raises(AdapterError, match="no names of PEFT, loralib or torchtune"):
        format_of(["a.weight"])


def test_the_models_have_the_layers_that_are_named() -> None:
    assert isinstance(tiny_lm("llama").get_submodule(LAYER), nn.Linear)
