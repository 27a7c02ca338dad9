"""Laws of adapter arithmetic, on the deltas and in PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lora_cli.errors import AdapterError, ConfigError
from lora_cli.nn.adapter import load_adapter, save_adapter
from lora_cli.nn.combine import METHODS, combine
from lora_cli.nn.inject import inject, merge
from lora_cli.nn.stored import Factors, StoredAdapter, read_stored
from lora_cli.spec import COMBINE_METHODS, LoraSpec

from .adapters import adapted_lm, deltas, peft_logits, saved, stored
from .models import FRESH, lm_logits, tiny, tiny_lm, trained


def assert_sum(result: StoredAdapter, terms: list[tuple[float, StoredAdapter]], atol: float = 1e-6) -> None:
    found = deltas(result)
    assert set(found) == {name for _, adapter in terms for name in adapter.layers}
    for name, delta in found.items():
        expected = sum(weight * adapter.layers[name].delta() for weight, adapter in terms if name in adapter.layers)
        torch.testing.assert_close(delta, expected, rtol=1e-6, atol=atol)


PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alike": ({}, {}),
    "other targets": ({"targets": ["q_proj"]}, {"targets": ["v_proj", "1.mlp.down_proj"]}),
    "other ranks and scalings": ({"r": 2}, {"r": 5, "scaling": "alpha/sqrt(r)", "alpha": 3.5}),
    "patterns": ({"rank_pattern": {"q_proj": 1}}, {"alpha_pattern": {"down_proj": 2.0}}),
    "more than full rank": ({"r": 12}, {"r": 12}),
    "embeddings": ({"targets": ["embed_tokens"]}, {"targets": ["embed_tokens", "q_proj"]}),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("method", ["concat", "svd"])
def test_delta_of_a_sum_is_the_sum_of_the_deltas(method: str, pair: Any, tmp_path: Path) -> None:
    one, other = stored(tmp_path / "a", **pair[0]), stored(tmp_path / "b", seed=2, **pair[1])
    result = read_stored(saved(combine([one, other], [1.0, -0.5], method=method), tmp_path / "c"))
    assert_sum(result, [(1.0, one), (-0.5, other)])


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_peft_and_we_compute_the_sum_with_it(pair: Any, tmp_path: Path) -> None:
    terms = [(0.7, stored(tmp_path / "a", **pair[0])), (0.4, stored(tmp_path / "b", seed=2, **pair[1]))]
    saved(combine([adapter for _, adapter in terms], [weight for weight, _ in terms]), tmp_path / "c")
    model = tiny_lm("llama").double()
    with torch.no_grad():
        for weight, adapter in terms:
            for name, layer in adapter.layers.items():
                delta = layer.delta().T if layer.is_embedding else layer.delta()
                model.get_submodule(name).weight += weight * delta
    ours = tiny_lm("llama")
    load_adapter(ours, tmp_path / "c", fresh=(), fingerprint=None)
    torch.testing.assert_close(peft_logits(tmp_path / "c"), lm_logits(model), rtol=0, atol=2e-6)
    torch.testing.assert_close(lm_logits(ours.double()), lm_logits(model), rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", COMBINE_METHODS)
def test_weight_one_of_one_adapter_is_the_identity_bit_for_bit(method: str, tmp_path: Path) -> None:
    spec = {"scaling": "alpha/sqrt(r)", "alpha_pattern": {"q_proj": 2.0}}
    adapter = stored(tmp_path / "a", **spec)
    result = combine([adapter], [1.0], method=method)
    saved(result, tmp_path / "b")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    same = all(torch.equal(before[key], after[key]) for key in before)
    assert same == (method != "svd")
    assert_sum(result, [(1.0, adapter)])


@pytest.mark.parametrize("spec", [{"variant": "dora"}, {"bias": "all", "family": "qwen2"}], ids=["dora", "biases"])
def test_what_is_no_sum_may_still_be_taken_alone(spec: dict[str, Any], tmp_path: Path) -> None:
    adapter = stored(tmp_path / "a", **spec)
    assert combine([adapter, adapter], [1.0, 0.0]) is not None
    saved(combine([adapter], [1.0]), tmp_path / "b")
    family = spec.get("family", "llama")
    torch.testing.assert_close(peft_logits(tmp_path / "b", family), peft_logits(tmp_path / "a", family), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["concat", "linear"])
def test_interpolation_begins_and_ends_at_the_inputs_bit_for_bit(method: str, tmp_path: Path) -> None:
    adapters = [stored(tmp_path / "a"), stored(tmp_path / "b", seed=2)]
    for end, weights in enumerate(([1.0, 0.0], [0.0, 1.0])):
        result = combine(adapters, weights, method=method)
        for name, layer in result.layers.items():
            assert torch.equal(layer.A, adapters[end].layers[name].A)
            assert torch.equal(layer.B, adapters[end].layers[name].B)
            assert layer.scaling == adapters[end].layers[name].scaling


def test_an_adapter_less_itself_is_nothing(tmp_path: Path) -> None:
    adapter = stored(tmp_path / "a")
    result = combine([adapter, adapter], [1.0, -1.0], method="svd", rank=2)
    assert max(float(delta.abs().max()) for delta in deltas(result).values()) < 1e-6


def test_truncation_is_the_best_of_its_rank(tmp_path: Path) -> None:
    one, other = stored(tmp_path / "a"), stored(tmp_path / "b", seed=2)
    exact, cut = (deltas(combine([one, other], [1.0, 1.0], method="svd", rank=rank)) for rank in (None, 3))
    for name, delta in exact.items():
        U, values, V = torch.linalg.svd(delta)
        best = U[:, :3] @ values[:3].diag() @ V[:3]
        torch.testing.assert_close(cut[name], best, rtol=1e-5, atol=1e-6)
        assert torch.linalg.matrix_rank(cut[name], tol=1e-5) == 3


@pytest.mark.parametrize(("method", "theirs"), [("concat", "cat"), ("linear", "linear"), ("svd", "svd")])
@pytest.mark.parametrize("weights", [[0.7, 0.4], [1.0, -0.5]], ids=str)
def test_peft_combines_to_the_same(method: str, theirs: str, weights: list[float], tmp_path: Path) -> None:
    from peft import PeftModel

    adapters = [stored(tmp_path / "a"), stored(tmp_path / "b", seed=2, alpha=3.0)]
    rank = {"rank": 3} if method == "svd" else {}
    peft = PeftModel.from_pretrained(tiny_lm("llama"), str(tmp_path / "a"), adapter_name="a")
    peft.load_adapter(str(tmp_path / "b"), adapter_name="b")
    more = {"svd_rank": 3} if rank else {}
    peft.add_weighted_adapter(["a", "b"], weights, "c", combination_type=theirs, **more)
    peft.set_adapter("c")
    saved(combine(adapters, weights, method=method, **rank), tmp_path / "c")
    torch.testing.assert_close(peft_logits(tmp_path / "c"), lm_logits(peft.eval().double()), rtol=0, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=3, max_size=3), st.integers(0, 9))
def test_sums_do_not_depend_on_the_order(weights: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = [(torch.randn(2, 5, generator=generator), torch.randn(4, 2, generator=generator)) for _ in weights]
    terms = [(w, Factors(A, B, 0.5)) for w, (A, B) in zip(weights, factors, strict=True)]
    one, other = (METHODS["svd"]("layer", order, None).delta() for order in (terms, terms[::-1]))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def classifier(folder: Path, seed: int, **spec: Any) -> StoredAdapter:
    model = tiny("bert")
    injection = inject(model, LoraSpec(targets=["query"], r=2, **spec), groups={}, fresh=FRESH["bert"])
    trained(model, seed)
    facts: dict[str, Any] = {"base_name": "bert", "revision": None, "task_type": "SEQ_CLS", "fingerprint": None}
    save_adapter(model, injection, folder, **facts, extra={"labels": [f"of {seed}", "b", "c"]})
    return read_stored(folder)


def test_heads_that_differ_need_to_be_chosen(tmp_path: Path) -> None:
    one, other = classifier(tmp_path / "a", 1), classifier(tmp_path / "b", 2)
    with pytest.raises(AdapterError, match=r"classifier.*head=1"):
        combine([one, other], [1.0, 1.0])
    result = combine([one, other], [1.0, 1.0], head=2)
    assert_sum(result, [(1.0, one), (1.0, other)])
    assert all(torch.equal(result.others[key], other.others[key]) for key in other.others)
    assert result.facts["extra"]["labels"][0] == "of 2"
    model = tiny("bert")
    load_adapter(model, saved(result, tmp_path / "c"), fresh=FRESH["bert"], fingerprint=None)
    merge(model)


def test_one_adapter_may_get_the_head_of_another(tmp_path: Path) -> None:
    one, other = classifier(tmp_path / "a", 1), classifier(tmp_path / "b", 2)
    result = combine([one, other], [1.0, 0.0], head=2)
    assert_sum(result, [(1.0, one)])
    assert all(torch.equal(result.others[key], other.others[key]) for key in other.others)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"variant": "dora"}, "DoRA"),
    "biases": ({"bias": "all", "family": "qwen2"}, "bias"),
    "another base": ({"family": "qwen3"}, "another base model"),
    "another size": ({"family": "gpt2", "targets": ["c_attn"]}, "another base model"),
}


@pytest.mark.parametrize(("spec", "said"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_sum_is_refused_by_name(spec: dict[str, Any], said: str, tmp_path: Path) -> None:
    family = spec.get("family") if "bias" in spec else "llama"
    one, other = stored(tmp_path / "a", family=family), stored(tmp_path / "b", seed=2, **spec)
    facts = {"fingerprint": None}
    bases = [StoredAdapter(**{**vars(adapter), "facts": {**adapter.facts, **facts}}) for adapter in (one, other)]
    with pytest.raises(AdapterError, match=said):
        combine(bases, [1.0, 0.5])


def test_fingerprints_decide_before_names_and_can_be_overruled(tmp_path: Path) -> None:
    one, other = stored(tmp_path / "a"), stored(tmp_path / "b", seed=2)
    foreign = StoredAdapter(**{**vars(other), "facts": {**other.facts, "fingerprint": "g"}})
    with pytest.raises(AdapterError, match="force_base=true"):
        combine([one, foreign], [1.0, 1.0])
    assert_sum(combine([one, foreign], [1.0, 1.0], force_base=True), [(1.0, one), (1.0, other)])


def test_linear_needs_one_rank(tmp_path: Path) -> None:
    one, other = stored(tmp_path / "a", r=2), stored(tmp_path / "b", seed=2)
    with pytest.raises(AdapterError, match=r"ranks \[2, 4\].*concat"):
        combine([one, other], [1.0, 1.0], method="linear")


def test_no_weight_at_all_is_refused(tmp_path: Path) -> None:
    adapted_lm(tmp_path / "a")
    with pytest.raises(ConfigError, match="weights"):
        combine([read_stored(tmp_path / "a")], [0.0])


def test_methods_of_the_configuration_are_these() -> None:
    assert tuple(METHODS) == COMBINE_METHODS
