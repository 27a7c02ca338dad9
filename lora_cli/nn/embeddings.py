"""Embeddings with low-rank updates. Knows one layer, as `layers` does.

Dimensions in names: I in, O out, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_cli.nn.layers import LoraLayer

__all__ = ["LoraEmbedding"]


class LoraEmbedding(LoraLayer):
    """Over an `nn.Embedding`: in is the number of entries, out their size; the weight is (in, out).

    A is zero and B normal, as in loralib and PEFT: a step changes the rows of the entries seen in it, no others. The
    padding entry gets no gradient, so its update stays zero. Dropout does not act, an index having nothing to
    drop. A base that multiplies its output (`embed_scale`, Gemma) has the update multiplied too.
    """

    is_transposed = True
    is_projection = False

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """An Embedding that looks up what it is given and leaves its weight alone.

        Position tables of OPT and BART do not: their `forward` counts positions itself.
        """
        looks_up = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        return isinstance(module, nn.Embedding) and module.max_norm is None and looks_up

    def _draw(self, a_RI: Tensor, b_OR: Tensor, generator: torch.Generator | None) -> None:
        nn.init.normal_(b_OR, generator=generator)

    def _reduce(self, x: Tensor) -> Tensor:
        assert isinstance(self.base_layer, nn.Embedding)
        dtype = self.base_layer.weight.dtype
        ax_R = functional.embedding(x, self.A.T, padding_idx=self.base_layer.padding_idx).to(dtype)
        scale: Tensor | float = getattr(self.base_layer, "embed_scale", 1.0)
        return ax_R * (scale.to(dtype) if isinstance(scale, Tensor) else scale)
