"""Fifty plain steps of a GPT-2, a LLaMA and a T5 beside fifty of PEFT's: the same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.nn import Injection, adapted_layers, inject, save_adapter
from lora_cli.spec import LoraSpec

from .models import lm_logits, tiny_lm

STEPS = 50
# A scaling that is no power of two: multiplying by one is exact wherever it is done, and would hide its place.
LORA: dict[str, Any] = {"r": 4, "alpha": 6.0}
TARGETS = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "t5": ["q", "v"]}


def batch_of(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    """Sentences that count upwards, from a start of their own: there is something to learn."""
    starts = torch.randint(3, 20, (4, 1), generator=torch.Generator().manual_seed(step % 5))
    ids = starts + torch.arange(8)
    labels = ids.masked_fill(torch.arange(8) < 2, -100)
    return {"input_ids": ids, "labels": ids.flip(1) if model.config.is_encoder_decoder else labels}


def losses_of(model: nn.Module) -> list[float]:
    """The loop as one writes it, with the model's own dropout."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    model.train()
    for step in range(STEPS):
        torch.manual_seed(step)
        loss = model(**batch_of(model, step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def ours(family: str, targets: list[str]) -> tuple[nn.Module, Injection]:
    model = tiny_lm(family)
    return model, inject(model, LoraSpec(targets=targets, **LORA), groups={}, seed=3)


def peft_twin(family: str, injected: nn.Module, targets: list[str], alpha: float = LORA["alpha"]) -> nn.Module:
    """PEFT's model with, layer by layer, the same A."""
    from peft import LoraConfig, get_peft_model

    leaves = [target.partition(":")[0] for target in targets]
    config = LoraConfig(r=LORA["r"], lora_alpha=alpha, target_modules=leaves, fan_in_fan_out=family == "gpt2")
    model = get_peft_model(tiny_lm(family), config)
    with torch.no_grad():
        for name, layer in adapted_layers(injected).items():
            model.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.copy_(layer.A)
    return model


@pytest.mark.parametrize("family", TARGETS)
def test_fifty_losses_are_pefts_and_so_is_the_saved_adapter(family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model, injection = ours(family, TARGETS[family])
    twin, other = (peft_twin(family, model, TARGETS[family], alpha) for alpha in (LORA["alpha"], LORA["alpha"] + 1))
    losses = losses_of(model)
    assert losses == pytest.approx(losses_of(twin), abs=1e-5, rel=0)
    # The comparison has something to see: it learns, and another scaling is told apart.
    assert losses[-1] < losses[0] - 0.1
    assert max(abs(a - b) for a, b in zip(losses, losses_of(other), strict=True)) > 1e-3
    save_adapter(
        model, injection, tmp_path / "a", base_name="tiny", revision=None, task_type=None, fingerprint=None, extra={}
    )
    loaded = PeftModel.from_pretrained(tiny_lm(family), str(tmp_path / "a")).eval()
    torch.testing.assert_close(lm_logits(loaded.double()), lm_logits(model.double()), rtol=0, atol=1e-6)


def test_parts_learn_as_one_masked_update_does() -> None:
    """PEFT on the whole projection, its gradients masked to the blocks of two parts, is our pair of parts."""
    from peft import LoraConfig, get_peft_model

    model, _ = ours("gpt2", ["c_attn:q+v"])
    config = LoraConfig(r=8, lora_alpha=12, target_modules=["c_attn"], fan_in_fan_out=True)
    twin = get_peft_model(tiny_lm("gpt2"), config)
    for name, layer in adapted_layers(model).items():
        pair = twin.get_submodule(f"base_model.model.{name}")
        mask = layer.placement.spread(torch.ones_like(layer.B))
        pair.lora_A["default"].weight.data.copy_(layer.A)
        pair.lora_B["default"].weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    assert losses_of(model) == pytest.approx(losses_of(twin), abs=1e-5, rel=0)
