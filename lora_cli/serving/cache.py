"""Keys and values of rows that are being written, padded on the left; rows join and leave. Knows transformers' cache.

Dimensions in names: N rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lora_cli.growing_cache import growing_cache

__all__ = ["Rows", "prefill"]


class Rows:
    """The rows of a decoder that go on: what the model keeps of them, where they begin and how long they are."""

    def __init__(self, cache: Any, mask_NT: Tensor) -> None:
        self._cache, self._mask_NT = cache, mask_NT

    def step(self, model: Any, tokens_N: Sequence[int]) -> Tensor:
        """Add a token to each row: the logits (N, V) of what follows."""
        ids = torch.tensor(tokens_N, device=self._mask_NT.device)[:, None]
        positions_N1 = self._mask_NT.sum(1, keepdim=True)
        self._mask_NT = functional.pad(self._mask_NT, (0, 1), value=1)
        return _forward(model, ids, self._mask_NT, positions_N1, self._cache)

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all but these rows, and the padding that all of them have."""
        chosen = torch.tensor(rows, device=self._mask_NT.device)
        mask_NT = self._mask_NT[chosen]
        start = int(mask_NT.argmax(1).min()) if len(rows) else 0
        self._mask_NT = mask_NT[:, start:]
        for layer in self._cache.layers:
            layer.keys = layer.keys[chosen, :, start:]
            layer.values = layer.values[chosen, :, start:]

    def join(self, others: Rows) -> None:
        """Take the rows of `others` behind one's own."""
        width = max(self._mask_NT.shape[1], others._mask_NT.shape[1])
        both = [functional.pad(mask, (width - mask.shape[1], 0)) for mask in (self._mask_NT, others._mask_NT)]
        self._mask_NT = torch.cat(both)
        for layer, other in zip(self._cache.layers, others._cache.layers, strict=True):
            layer.keys = torch.cat([_wide(layer.keys, width), _wide(other.keys, width)])
            layer.values = torch.cat([_wide(layer.values, width), _wide(other.values, width)])


def prefill(model: Any, batch: Mapping[str, Tensor]) -> tuple[Rows, Tensor]:
    """The rows of prompts, padded on the left, and the logits (N, V) of what follows each."""
    mask_NT, cache = batch["attention_mask"], growing_cache()
    # Padding has positions too, which nobody looks at.
    positions_NT = (mask_NT.cumsum(1) - 1).clamp(min=0)
    return Rows(cache, mask_NT), _forward(model, batch["input_ids"], mask_NT, positions_NT, cache)


def _forward(model: Any, ids: Tensor, mask_NT: Tensor, positions: Tensor, cache: Any) -> Tensor:
    # BLOOM counts positions by the mask alone.
    known = inspect.signature(model.forward).parameters
    wanted: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
    extra = {name: value for name, value in wanted.items() if name in known}
    found = model(input_ids=ids, attention_mask=mask_NT, past_key_values=cache, use_cache=True, **extra)
    logits: Tensor = found.logits[:, -1].float()
    return logits


def _wide(x: Tensor, width: int) -> Tensor:
    """(N, heads, T, d) with zeros in front, up to `width` tokens."""
    return functional.pad(x, (0, 0, width - x.shape[2], 0))
