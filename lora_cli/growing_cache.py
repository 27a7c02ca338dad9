"""Keys and values of a text that is being written, in memory that has room for more. Knows transformers' cache only."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

__all__ = ["growing_cache"]

_ROOM = 64
"""Tokens for which memory is taken beforehand."""


def growing_cache(config: Any = None) -> DynamicCache:
    """transformers' cache for a decoder of this config, which copies all that it holds not with each token but with
    each sixty-fourth. Layers that forget, as those with a sliding window do, are left as they are; without a config
    none forgets.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=config)
    cache.layers = [_layer_class()() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if config is None:
        cache.layer_class_to_replicate = _layer_class()
    return cache


@functools.cache
def _layer_class() -> type[DynamicLayer]:
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):  # type: ignore[misc]
        keys: Tensor
        values: Tensor

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self._rooms = _Room(), _Room()

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            keys, values = self._rooms
            self.keys, self.values = keys.joined(self.keys, key_states), values.joined(self.values, value_states)
            return self.keys, self.values

    return GrowingLayer


class _Room:
    """Memory for more tokens than there are yet."""

    def __init__(self) -> None:
        self._whole: Tensor | None = None

    def joined(self, kept: Tensor, new: Tensor) -> Tensor:
        """(N, heads, T, d) and (N, heads, t, d) → (N, heads, T + t, d): a view."""
        num_kept = kept.shape[-2] if kept.numel() else 0
        end, whole = num_kept + new.shape[-2], self._whole
        if whole is None or end > whole.shape[-2] or not _begins(whole, kept):
            # Full, or rows have joined, left or changed places.
            self._whole = whole = new.new_empty(*new.shape[:-2], end + _ROOM, new.shape[-1])
            if num_kept:
                whole[..., :num_kept, :] = kept
        whole[..., num_kept:end, :] = new
        return whole[..., :end, :]


def _begins(whole: Tensor, kept: Tensor) -> bool:
    """Whether `kept` is the first tokens of `whole`, and in its memory."""
    is_same = kept.data_ptr() == whole.data_ptr() and kept.stride() == whole.stride()
    return is_same and kept.shape[:-2] == whole.shape[:-2]
