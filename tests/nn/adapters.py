"""Adapters on disk, made quickly: ours on a tiny language model, whose parameters were moved, and PEFT reading them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_cli.nn.adapter import save_adapter
from lora_cli.nn.inject import inject
from lora_cli.nn.stored import StoredAdapter, read_stored, save_stored
from lora_cli.spec import LoraSpec

from .models import lm_logits, tiny_lm, trained


def adapted_lm(folder: Path, *, family: str = "llama", seed: int = 1, **spec: Any) -> nn.Module:
    """A language model with an adapter, which is saved to `folder`."""
    model = tiny_lm(family)
    settings = {"r": 4, "alpha": 6.0, "targets": ["q_proj", "down_proj"]} | spec
    injection = inject(model, LoraSpec(**settings), groups={})
    trained(model, seed)
    save_adapter(
        model, injection, folder, base_name=family, revision=None, task_type="CAUSAL_LM", fingerprint="f", extra={}
    )
    return model


def stored(folder: Path, **spec: Any) -> StoredAdapter:
    adapted_lm(folder, **spec)
    return read_stored(folder)


def deltas(adapter: StoredAdapter) -> dict[str, torch.Tensor]:
    return {name: layer.delta() for name, layer in adapter.layers.items()}


def peft_logits(folder: Path, family: str = "llama") -> torch.Tensor:
    """What PEFT computes with the adapter in `folder`, in fp64: the bound shows the formula, not rounding."""
    from peft import PeftModel

    return lm_logits(PeftModel.from_pretrained(tiny_lm(family), str(folder)).eval().double())


def saved(adapter: StoredAdapter, folder: Path) -> Path:
    save_stored(adapter, folder)
    return folder
