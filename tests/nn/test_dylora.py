"""DyLoRA: every rank up to r in one adapter."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.errors import AdapterError, ConfigError
from lora_cli.nn.adapter import load_adapter, save_adapter
from lora_cli.nn.inject import Injection, adapted_layers, inject, merge, remove, truncate, unmerge
from lora_cli.nn.stored import read_stored, save_stored
from lora_cli.spec import LoraSpec

from .models import FRESH, logits, tiny, tiny_lm, trained

# PEFT asks the hub for the base's config when it saves; there is no hub in a test.
os.environ["HF_HUB_OFFLINE"] = "1"

SPEC: dict[str, Any] = {"variant": "dylora", "r": 6, "alpha": 9.0, "targets": ["query", "word_embeddings"]}


def adapted(**spec: Any) -> tuple[nn.Module, Injection]:
    model = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    injection = inject(model, LoraSpec(**(SPEC | spec)), groups={}, fresh=FRESH["bert"])
    return trained(model), injection


def save(model: nn.Module, injection: Injection, folder: Path) -> None:
    save_adapter(
        model, injection, folder, base_name="tiny", revision=None, task_type="SEQ_CLS", fingerprint=None, extra={}
    )


def loaded(folder: Path) -> tuple[nn.Module, Injection]:
    model = tiny("bert")
    return model, load_adapter(model, folder, fresh=FRESH["bert"], fingerprint=None)


def drawn_ranks(model: nn.Module) -> set[int | None]:
    return {layer.training_rank for layer in adapted_layers(model).values()}


def pass_with(model: nn.Module, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return logits(model.train())


@pytest.mark.parametrize(("scaling", "alpha"), [("alpha/r", 9.0), ("alpha/sqrt(r)", 2.0)])
def test_a_step_computes_what_an_adapter_of_the_drawn_rank_would(scaling: str, alpha: float) -> None:
    model, injection = adapted(scaling=scaling, alpha=alpha)
    for seed in range(4):
        found = pass_with(model, seed)
        (b,) = drawn_ranks(model)
        smaller = copy.deepcopy(model).eval()
        truncate(smaller, injection, b)
        assert {layer.scaling for layer in adapted_layers(smaller).values()} == {
            alpha / (b if scaling == "alpha/r" else b**0.5)
        }
        torch.testing.assert_close(logits(smaller), found)


def test_only_the_drawn_ranks_get_a_gradient() -> None:
    model, _ = adapted()
    layer = adapted_layers(model)["bert.encoder.layer.0.attention.self.query"]
    torch.manual_seed(1)
    model.train()(input_ids=torch.tensor([[2, 5, 9]])).logits.square().sum().backward()
    (b,) = drawn_ranks(model)
    assert 1 <= b < 6
    assert (
        (layer.A.grad.abs().sum(1) > 0).tolist()
        == (layer.B.grad.abs().sum(0) > 0).tolist()
        == [rank < b for rank in range(6)]
    )


def test_every_rank_is_drawn_by_the_seed_and_evaluation_draws_none() -> None:
    model, _ = adapted()
    ranks = []
    for seed in range(40):
        pass_with(model, seed)
        ranks += drawn_ranks(model)
    assert sorted(set(ranks)) == [1, 2, 3, 4, 5, 6]
    pass_with(model, 7)
    assert drawn_ranks(model) == {ranks[7]}
    state = torch.get_rng_state()
    logits(model.eval())
    assert drawn_ranks(model) == {None}
    assert torch.equal(torch.get_rng_state(), state)


def test_merging_after_a_step_merges_every_rank() -> None:
    model, _ = adapted()
    before = logits(model.eval())
    pass_with(model, 1)
    merge(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert torch.equal(logits(model.eval()), before)


def test_a_model_without_the_adapter_draws_no_more() -> None:
    model, _ = adapted()
    remove(model)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    model.train()(input_ids=torch.tensor([[2, 5]]))
    assert torch.equal(torch.get_rng_state(), state)


def test_copy_draws_for_itself() -> None:
    model, _ = adapted()
    twin = copy.deepcopy(model)
    pass_with(twin, 1)
    assert drawn_ranks(model) == {None}
    assert drawn_ranks(twin) <= {1, 2, 3, 4, 5, 6}


def test_saved_adapter_is_lora_to_peft_and_dylora_here(tmp_path: Path) -> None:
    from peft import PeftModel

    model, injection = adapted()
    save(model, injection, tmp_path)
    other, again = loaded(tmp_path)
    assert again.spec.variant == "dylora"
    assert torch.equal(logits(other), logits(model.eval()))
    peft = PeftModel.from_pretrained(tiny("bert"), str(tmp_path)).eval()
    torch.testing.assert_close(logits(peft.double()), logits(model.double()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("r", [1, 4, 6])
def test_truncated_adapter_is_saved_and_exported_alike(r: int, tmp_path: Path) -> None:
    model, injection = adapted(alpha_pattern={"query": 4.0})
    save(model, injection, tmp_path / "whole")
    save_stored(read_stored(tmp_path / "whole", r=r), tmp_path / "small")
    truncate(model, injection, r)
    small, again = loaded(tmp_path / "small")
    assert (again.spec.variant, again.spec.r) == ("lora", r)
    torch.testing.assert_close(logits(small), logits(model.eval()), rtol=1e-6, atol=1e-6)


def test_only_its_own_adapters_and_ranks_are_truncated(tmp_path: Path) -> None:
    model, injection = adapted(variant="lora")
    with pytest.raises(ConfigError, match=r"lora.r=2: only for an adapter trained with lora=dylora; lora inspect"):
        truncate(model, injection, 2)
    model, injection = adapted()
    with pytest.raises(ConfigError, match=r"lora.r=7: at most 6"):
        truncate(model, injection, 7)
    save(model, injection, tmp_path)
    with pytest.raises(ConfigError, match=r"lora.r=7: at most 6"):
        read_stored(tmp_path, r=7)


@pytest.mark.parametrize(
    ("file", "change"), [("lora.json", {"variant": "vera"}), ("adapter_config.json", {"use_dora": True})]
)
def test_note_that_does_not_fit_is_refused(file: str, change: dict[str, Any], tmp_path: Path) -> None:
    save(*adapted(), tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=r"variant=\S+ does not fit adapter_config.json"):
        loaded(tmp_path)


def test_a_rank_of_its_own_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora.variant=dylora, which draws one rank for all layers"):
        LoraSpec(**SPEC, rank_pattern={"query": 2})


def test_parts_and_groups_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="dylora: not for parts of a fused projection"):
        inject(tiny_lm("gpt2"), LoraSpec(variant="dylora", r=2, targets=["c_attn:q"]), groups={})
    net = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2))
    with pytest.raises(ConfigError, match="dylora: not for a convolution in 2 groups"):
        inject(net, LoraSpec(variant="dylora", r=2, targets=["0"]), groups={})
