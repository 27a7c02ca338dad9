"""A model without an adapter: its weights rounded as they will be stored, and written as a transformers folder."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_cli.nn import dequantize, merge, quantized_size, remove
from lora_cli.tokenizer import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DTYPES", "merge_all", "rounded", "save_merged"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def merge_all(model: torch.nn.Module) -> dict[str, float]:
    """Merge every adapted layer, remove the adapter and dequantise what is quantised: `model` is a plain one then.

    Returns layer → largest change of a weight.
    """
    changes = merge(model)
    remove(model)
    if quantized_size(model):
        dequantize(model)
    return changes


@contextlib.contextmanager
def rounded(model: torch.nn.Module, dtype: str) -> Iterator[None]:
    """Within the block every weight has the value that storing it as `dtype` leaves; then its old one, bit for bit."""
    originals = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(DTYPES[dtype]).to(parameter.dtype)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = originals[name]


def save_merged(model: PreTrainedModel, folder: Path, *, dtype: str, shard_size: str) -> None:
    """Write weights (safetensors, in files of at most `shard_size`) and config; `model` ends up stored as `dtype`."""
    model.to(DTYPES[dtype])
    config = copy.deepcopy(model.config)
    # Switched off for training only.
    config.use_cache = True
    model.config = config
    with quiet():
        model.save_pretrained(str(folder), max_shard_size=shard_size)
