"""VeRA: two vectors a layer between random matrices that all layers share."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.errors import AdapterError, ConfigError
from lora_cli.nn.adapter import load_adapter, save_adapter
from lora_cli.nn.inject import (
    Injection,
    adapted_layers,
    inject,
    load_trainable_state,
    merge,
    remove,
    trainable_state,
    unmerge,
)
from lora_cli.nn.layers import LoraLinear
from lora_cli.nn.stored import read_stored
from lora_cli.nn.vera import draw_pair, widest
from lora_cli.spec import LoraSpec

from .models import FAMILIES, FRESH, QUERY_VALUE, lm_logits, logits, tiny, tiny_lm, trained

# PEFT asks the hub for the base's config when it saves; there is no hub in a test.
os.environ["HF_HUB_OFFLINE"] = "1"

SPEC: dict[str, Any] = {"variant": "vera", "r": 20}
WIDE = ["query", "intermediate.dense", "output.dense"]
"""Layers of three sizes: 16 × 16, 24 × 16 and 16 × 24."""


def adapted(family: str = "bert", *, fresh: tuple[str, ...] | None = None, **spec: Any) -> tuple[nn.Module, Injection]:
    model = tiny(family)
    settings = SPEC | {"targets": WIDE if family == "bert" else QUERY_VALUE[family]} | spec
    fresh = FRESH[family] if fresh is None else fresh
    return model, inject(model, LoraSpec(**settings), groups={}, fresh=fresh)


def save(model: nn.Module, injection: Injection, folder: Path, task_type: str | None = "SEQ_CLS") -> None:
    save_adapter(
        model, injection, folder, base_name="tiny", revision=None, task_type=task_type, fingerprint=None, extra={}
    )


def from_peft(base: nn.Module, folder: Path, **config: Any) -> nn.Module:
    from peft import VeraConfig, get_peft_model

    settings: dict[str, Any] = {"r": 20, "target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, on the matrices that are not saved
        model = get_peft_model(base, VeraConfig(**(settings | config)))
        trained(model, 5).save_pretrained(folder)
    return model.eval()


def into_peft(base: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return PeftModel.from_pretrained(base, str(folder)).eval()


def assert_same(one: nn.Module, other: nn.Module, run: Callable[[nn.Module], torch.Tensor] = logits) -> None:
    # In fp64, so that the bound shows the same formula, not the rounding of a deep fp32 model.
    torch.testing.assert_close(run(one.double()), run(other.double()), rtol=0, atol=1e-6)


def parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    return [layer.get_parameter(name) for layer in adapted_layers(model).values()]


def test_fresh_adapter_changes_nothing_and_trained_one_does() -> None:
    model, _ = adapted()
    before = logits(tiny("bert"))
    assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(trained(model)), before)


def test_update_and_gradients_are_those_of_the_papers_formula() -> None:
    A, B = draw_pair(6, 9, 12, seed=3)
    layer = LoraLinear(nn.Linear(7, 5), r=6, alpha=16.0, variant="vera", shared=(A, B))
    trained(layer)
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    weight = layer.base_layer.weight + layer.lambda_b.diag() @ B[:5] @ layer.lambda_d.diag() @ A[:, :7]
    expected = nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.weight, weight)
    vectors = (layer.lambda_b, layer.lambda_d)
    torch.testing.assert_close(
        torch.autograd.grad(layer(x).square().sum(), vectors), torch.autograd.grad(expected.square().sum(), vectors)
    )


def test_vectors_start_as_in_the_paper() -> None:
    model, _ = adapted()
    assert all(torch.equal(d, torch.full((20,), 0.1)) for d in parameters(model, "lambda_d"))
    assert not any(b.any() for b in parameters(model, "lambda_b"))


def test_layers_of_all_sizes_share_one_pair_of_tensors_also_after_a_move() -> None:
    model, _ = adapted()
    model = model.double()
    assert widest(model, adapted_layers(model)) == (24, 24)
    for name, shape in (("A", (20, 24)), ("B", (24, 20))):
        (one,) = {id(each): each for each in parameters(model, name)}.values()
        assert tuple(one.shape) == shape
        assert not one.requires_grad


def test_only_the_vectors_are_counted_as_trained() -> None:
    model, injection = adapted(fresh=("classifier",))
    vectors = sum(20 + layer.out_features for layer in adapted_layers(model).values())
    head = 3 * 16 + 3
    assert injection.num_adapter == sum(row.num_parameters for row in injection.rows) == vectors
    assert injection.num_trainable == vectors + head
    assert injection.num_total == sum(p.numel() for p in tiny("bert").parameters()) + vectors + 2 * 24 * 20


def test_pair_depends_on_its_seed_alone() -> None:
    first, same, other = (adapted(projection_seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(parameters(first, "A")[0], parameters(same, "A")[0])
    assert not torch.equal(parameters(first, "A")[0], parameters(other, "A")[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_model_computes_what_the_adapted_one_did(family: str) -> None:
    model = trained(adapted(family)[0])
    before = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert torch.equal(logits(model), before)
    layers = list(adapted_layers(model))
    remove(model)
    base = tiny(family)
    assert all(torch.equal(model.get_submodule(name).weight, base.get_submodule(name).weight) for name in layers)


def test_checkpoint_holds_the_vectors_only_and_brings_them_back() -> None:
    model, other = trained(adapted()[0]), adapted()[0]
    state = trainable_state(model)
    assert {name.rpartition(".")[2] for name in state} == {"lambda_b", "lambda_d", "weight", "bias"}
    load_trainable_state(other, state)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("spec", [{}, {"bias": "all", "dropout": 0.1}, {"bias": "lora_only"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_adapter_comes_back_and_peft_computes_what_we_did(
    family: str, spec: dict[str, Any], tmp_path: Path
) -> None:
    model, injection = adapted(family, projection_seed=5, **spec)
    save(trained(model), injection, tmp_path)
    other = tiny(family)
    loaded = load_adapter(other, tmp_path, fresh=FRESH[family], fingerprint=None)
    assert torch.equal(logits(other), logits(model))
    assert (loaded.num_trainable, loaded.num_total) == (injection.num_trainable, injection.num_total)
    assert_same(into_peft(tiny(family), tmp_path), model)


def test_gpt2s_conv1d_beside_a_linear_layer_goes_to_peft_and_back(tmp_path: Path) -> None:
    model, other = tiny_lm("gpt2"), tiny_lm("gpt2")
    injection = inject(model, LoraSpec(**SPEC, targets=["c_attn", "mlp.c_proj"]), groups={})
    save(trained(model), injection, tmp_path, "CAUSAL_LM")
    load_adapter(other, tmp_path, fresh=(), fingerprint=None)
    assert torch.equal(lm_logits(other), lm_logits(model))
    assert_same(into_peft(tiny_lm("gpt2"), tmp_path), model, lm_logits)


def test_layer_saved_whole_does_not_widen_pefts_matrices(tmp_path: Path) -> None:
    # PEFT would take the widest of all layers called dense, also of those that train whole.
    model, injection = adapted(targets=["attention.output.dense"], modules_to_save=["intermediate"])
    save(trained(model), injection, tmp_path)
    assert_same(into_peft(tiny("bert"), tmp_path), model)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("key", [0, 17])
def test_we_compute_what_peft_did_with_its_matrices_saved_or_drawn_again(saved: bool, key: int, tmp_path: Path) -> None:
    peft = from_peft(tiny("bert"), tmp_path, projection_prng_key=key, save_projection=saved, bias="vera_only")
    model = tiny("bert")
    load_adapter(model, tmp_path, fresh=["classifier"], fingerprint=None)
    assert_same(model, peft)


def test_matrices_that_peft_drew_for_wider_layers_and_did_not_save_are_refused(tmp_path: Path) -> None:
    config = {"save_projection": False, "target_modules": ["query", "intermediate.dense"]}
    from_peft(tiny("bert"), tmp_path, modules_to_save=["intermediate"], **config)
    with pytest.raises(AdapterError, match=r"save_projection=false: PEFT drew the matrices for wider layers"):
        load_adapter(tiny("bert"), tmp_path, fresh=["classifier"], fingerprint=None)


def test_missing_matrices_are_named(tmp_path: Path) -> None:
    from_peft(tiny("bert"), tmp_path, save_projection=False)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"save_projection": True}))
    with pytest.raises(AdapterError, match=r"2 tensors are missing: base_model.vera_A, base_model.vera_B"):
        load_adapter(tiny("bert"), tmp_path, fresh=["classifier"], fingerprint=None)


def test_verbs_on_factors_refuse_it_by_name(tmp_path: Path) -> None:
    save(*adapted(), tmp_path)
    with pytest.raises(AdapterError, match="VeRA's layers share one A and B"):
        read_stored(tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"alpha": 8.0}, "lora.alpha=8.0: 16.0 with lora.variant=vera, whose"),
        ({"scaling": "alpha/sqrt(r)"}, "lora.scaling=.*without a scaling"),
        ({"rank_pattern": {"query": 2}}, "lora.rank_pattern=.*layers share A and B"),
        ({"alpha_pattern": {"query": 2.0}}, "lora.alpha_pattern=.*layers share A and B"),
        ({"variant": "lora", "projection_seed": 3}, "lora.projection_seed=3: for lora.variant=vera only"),
    ],
    ids=str,
)
def test_settings_without_a_meaning_are_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraSpec(**(SPEC | spec))


def test_embedding_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"only for linear layers; bert.embeddings.word_embeddings is Embedding"):
        adapted(targets=["word_embeddings"])


def test_parts_of_a_fused_projection_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="not for parts of a fused projection"):
        inject(tiny_lm("gpt2"), LoraSpec(**SPEC, targets=["c_attn:q"]), groups={})


def test_rows_of_new_tokens_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"model.add_tokens.*not with lora.variant=vera"):
        inject(tiny_lm("gpt2"), LoraSpec(**SPEC, targets=["c_attn"]), groups={}, new_rows=[39])
