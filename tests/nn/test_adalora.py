"""AdaLoRA: singular values between A and B, and a budget of ranks."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.errors import AdapterError, ConfigError
from lora_cli.nn.adalora import Allocator
from lora_cli.nn.adapter import load_adapter, save_adapter
from lora_cli.nn.inject import Injection, adapted_layers, inject, merge, unmerge
from lora_cli.nn.stored import read_stored
from lora_cli.spec import AdaLoraSpec, LoraSpec, TrainRun, TrainSpec

from .models import FRESH, lm_logits, logits, tiny, tiny_lm, trained

# PEFT asks the hub for the base's config when it saves; there is no hub in a test.
os.environ["HF_HUB_OFFLINE"] = "1"

BUDGET = AdaLoraSpec(target_r=2, start=0.2, end=0.3)
SPEC: dict[str, Any] = {"variant": "adalora", "r": 6, "targets": ["query", "intermediate.dense"], "adalora": BUDGET}


def adapted(**spec: Any) -> tuple[nn.Module, Injection]:
    model = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return model, inject(model, LoraSpec(**(SPEC | spec)), groups={}, fresh=FRESH["bert"])


def save(model: nn.Module, injection: Injection, folder: Path, task_type: str = "SEQ_CLS") -> None:
    save_adapter(
        model, injection, folder, base_name="tiny", revision=None, task_type=task_type, fingerprint=None, extra={}
    )


def into_peft(base: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder)).eval()


def peft_and_ours() -> tuple[nn.Module, nn.Module, list[nn.Parameter], list[nn.Parameter]]:
    """The same adapter in both, and its parameters in the same order."""
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(
        init_r=6,
        target_r=2,
        tinit=2,
        tfinal=3,
        total_step=10,
        lora_alpha=16,
        orth_reg_weight=0.1,
        target_modules=["query", "intermediate.dense"],
        task_type="SEQ_CLS",
    )
    peft, (model, _) = get_peft_model(tiny("bert"), config), adapted()
    theirs, mine = [], []
    for name, layer in adapted_layers(model).items():
        twin = peft.base_model.model.get_submodule(name)
        for factor in ("A", "E", "B"):
            mine.append(layer.get_parameter(factor))
            theirs.append(getattr(twin, f"lora_{factor}")["default"])
            theirs[-1].data.copy_(mine[-1].reshape(theirs[-1].shape))
    return peft.eval(), model.eval(), theirs, mine


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    ids = torch.randint(1, 40, (4, 6), generator=torch.Generator().manual_seed(step))
    return model(input_ids=ids, labels=torch.tensor([0, 1, 2, 0])).loss


def test_fresh_adapter_changes_nothing_and_trained_one_merges_exactly() -> None:
    model, _ = adapted()
    assert torch.equal(logits(model), logits(tiny("bert")))
    before = logits(trained(model))
    merge(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert torch.equal(logits(model), before)


def test_the_same_ranks_stay_as_in_peft_step_by_step() -> None:
    peft, model, theirs, mine = peft_and_ours()
    allocator = Allocator(adapted_layers(model).values(), BUDGET)
    optimizers = [torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0) for parameters in (theirs, mine)]
    budgets = []
    for step in range(1, 11):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(peft, step).backward()
        (loss_of(model, step) + allocator.penalty()).backward()
        for optimizer in optimizers:
            optimizer.step()
        peft.base_model.update_and_allocate(step)
        allocator.after_step(optimizers[1], step, 10)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other.reshape(one.shape), rtol=1e-3, atol=1e-4)
            assert torch.equal(one == 0, other.reshape(one.shape) == 0)
        budgets.append(sum(int(layer.E.count_nonzero()) for layer in adapted_layers(model).values()))
    assert budgets[:2] == [24, 24]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[6:] == [8, 8, 8, 8]


def test_averages_lie_in_the_optimizers_state() -> None:
    model, _ = adapted()
    layers = list(adapted_layers(model).values())
    optimizer = torch.optim.AdamW([p for layer in layers for p in (layer.A, layer.B, layer.E)])
    loss_of(model, 0).backward()
    optimizer.step()
    Allocator(layers, BUDGET).after_step(optimizer, 1, 10)
    names = {name for slots in optimizer.state_dict()["state"].values() for name in slots}
    assert {"sensitivity", "uncertainty"} <= names


def test_saved_adapter_comes_back_and_peft_computes_what_we_did(tmp_path: Path) -> None:
    model, injection = adapted(bias="all", alpha=5.0)
    trained(model)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.E[1:4] = 0
    save(model, injection, tmp_path)
    other = tiny("bert")
    again = load_adapter(other, tmp_path, fresh=FRESH["bert"], fingerprint=None)
    assert (again.spec.variant, again.spec.r, again.spec.adalora.target_r) == ("adalora", 6, 2)
    assert torch.equal(logits(other), logits(model))
    peft = into_peft(tiny("bert"), tmp_path)
    torch.testing.assert_close(logits(peft.double()), logits(model.double()), rtol=0, atol=1e-6)


def test_gpt2s_conv1d_goes_to_peft_too(tmp_path: Path) -> None:
    model = tiny_lm("gpt2")
    injection = inject(model, LoraSpec(**(SPEC | {"targets": ["c_attn"]})), groups={})
    save(trained(model), injection, tmp_path, "CAUSAL_LM")
    peft = into_peft(tiny_lm("gpt2"), tmp_path)
    torch.testing.assert_close(lm_logits(peft.double()), lm_logits(model.double()), rtol=0, atol=1e-6)


def test_we_compute_what_peft_did_after_it_took_ranks_away(tmp_path: Path) -> None:
    peft, _, theirs, _ = peft_and_ours()
    optimizer = torch.optim.AdamW(theirs, lr=0.05)
    for step in range(1, 11):
        optimizer.zero_grad()
        loss_of(peft, step).backward()
        optimizer.step()
        peft.base_model.update_and_allocate(step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.save_pretrained(tmp_path)
    model = tiny("bert")
    load_adapter(model, tmp_path, fresh=["classifier"], fingerprint=None)
    assert sum(int(layer.E.count_nonzero()) for layer in adapted_layers(model).values()) == 8
    torch.testing.assert_close(logits(model.double()), logits(peft.double()), rtol=0, atol=1e-6)


def test_verbs_on_factors_refuse_it_by_name(tmp_path: Path) -> None:
    save(*adapted(), tmp_path)
    with pytest.raises(AdapterError, match="AdaLoRA has values between A and B"):
        read_stored(tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"r": 1}, "lora.adalora.target_r=2: at most 1"),
        ({"rank_pattern": {"query": 2}}, "lora.rank_pattern=.*finds the ranks"),
        ({"alpha_pattern": {"query": 2.0}}, "lora.alpha_pattern=.*finds the ranks"),
        ({"scaling": "alpha/sqrt(r)"}, "lora.scaling=.*alpha/r with"),
        ({"variant": "lora"}, "lora.adalora: for lora.variant=adalora only"),
    ],
    ids=str,
)
def test_settings_without_a_meaning_are_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraSpec(**(SPEC | spec))


def test_phases_that_leave_no_steps_between_them_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora.adalora.end=0.5: below 0.5"):
        AdaLoraSpec(start=0.5, end=0.5)


@pytest.mark.parametrize("train", [{}, {"restore_best": False, "patience": 2}], ids=["best", "patience"])
def test_a_run_that_might_not_end_at_the_budget_is_refused(train: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="only its last steps keep to the budget"):
        TrainRun(lora=LoraSpec(**SPEC), train=TrainSpec(**train))


def test_embedding_and_parts_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="only for linear layers"):
        adapted(targets=["word_embeddings"])
    with pytest.raises(ConfigError, match="adalora: not for parts of a fused projection"):
        inject(tiny_lm("gpt2"), LoraSpec(**(SPEC | {"targets": ["c_attn:q"]})), groups={})
