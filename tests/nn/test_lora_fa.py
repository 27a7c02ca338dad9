"""LoRA-FA: A neither trains nor is anything kept for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.errors import ConfigError
from lora_cli.nn.adapter import load_adapter, save_adapter
from lora_cli.nn.inject import adapted_layers, inject, load_trainable_state, parameter_groups, trainable_state
from lora_cli.nn.layers import LoraLinear
from lora_cli.spec import LoraSpec

from .models import FRESH, logits, tiny, tiny_lm, trained

# PEFT asks the hub for the base's config when it saves; there is no hub in a test.
os.environ["HF_HUB_OFFLINE"] = "1"


def adapt(model: nn.Module, **spec: Any) -> Any:
    settings = {"variant": "lora_fa", "r": 2, "targets": ["query", "value"]} | spec
    return inject(model, LoraSpec(**settings), groups={}, fresh=FRESH["bert"])


def test_only_b_and_the_head_train() -> None:
    model = tiny("bert")
    injection = adapt(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in names if "attention" in name} == {f"{name}.B" for name in adapted_layers(model)}
    groups = parameter_groups(model, injection, lr=1e-3, head_lr=None, weight_decay=0.0)
    assert {name for group in groups for name in group["names"]} == names == trainable_state(model).keys()
    num_b = sum(layer.B.numel() for layer in adapted_layers(model).values())
    assert injection.num_adapter == sum(row.num_parameters for row in injection.rows) == num_b
    assert injection.num_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_is_the_one_that_lora_draws_so_a_checkpoint_without_it_is_enough() -> None:
    model, again, plain = trained_one(), tiny("bert"), tiny("bert")
    adapt(again)
    adapt(plain, variant="lora")
    load_trainable_state(again, trainable_state(model))
    assert torch.equal(logits(again), logits(model))
    for name, layer in adapted_layers(plain).items():
        assert torch.equal(layer.A, adapted_layers(again)[name].A)


def trained_one() -> nn.Module:
    model = tiny("bert")
    adapt(model)
    return trained(model)


@pytest.mark.parametrize(("variant", "kept"), [("lora", True), ("lora_fa", False)])
def test_the_input_is_kept_for_backward_only_where_a_trains(variant: str, kept: bool) -> None:
    layer = LoraLinear(nn.Linear(12, 9), r=2, alpha=2.0, variant=variant)
    x = torch.randn(7, 5, 12, requires_grad=True)
    shapes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    y.square().sum().backward()
    assert (any(torch.Size(shape).numel() == x.numel() for shape in shapes)) == kept
    assert layer.B.grad is not None
    assert x.grad is not None


def test_it_is_saved_as_any_lora_and_computes_the_same_in_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    model, again = tiny("bert"), tiny("bert")
    injection = adapt(model)
    options = {"base_name": None, "revision": None, "task_type": "SEQ_CLS", "fingerprint": None, "extra": {}}
    save_adapter(trained(model), injection, tmp_path / "adapter", **options)
    loaded = load_adapter(again, tmp_path / "adapter", fresh=FRESH["bert"], fingerprint=None)
    assert loaded.spec.variant == "lora"
    assert torch.equal(logits(again), logits(model))
    peft = PeftModel.from_pretrained(tiny("bert"), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(peft.double()), logits(model.double()), rtol=0, atol=1e-6)


def test_an_embedding_whose_a_starts_at_zero_is_refused_by_name() -> None:
    model = tiny_lm("llama", tie_word_embeddings=False)
    with pytest.raises(ConfigError, match=r"lora.variant=lora_fa: not for an embedding \(model.embed_tokens\)"):
        inject(model, LoraSpec(variant="lora_fa", targets=["embed_tokens"], r=2), groups={})
