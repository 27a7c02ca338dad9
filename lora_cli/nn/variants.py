"""How an update meets its base, and how strongly. Knows tensors; not which layer or model they belong to.

A variant answers the same question twice, for outputs (`combine`) and for weights (`merged_weight`), from
the same delta: that the two agree is what makes merging exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["SCALINGS", "VARIANTS", "Adapted", "DoRA", "Lora", "LoraFA", "Variant"]

SCALINGS: dict[str, Callable[[float, int], float]] = {
    "alpha/r": lambda alpha, r: alpha / r,
    "alpha/sqrt(r)": lambda alpha, r: alpha / math.sqrt(r),
}
"""Name → s(alpha, r). The second keeps the update's size independent of r (rsLoRA, arXiv:2312.03732)."""


class Adapted(Protocol):
    """What a variant needs of a layer: its frozen base, the update, and somewhere to keep parameters."""

    @property
    def bias(self) -> nn.Parameter | None:
        """The base's bias, which no variant scales."""
        ...

    @property
    def matrix(self) -> Tensor:
        """The base weight as (out, in), whatever its layout."""
        ...

    def delta_matrix(self) -> Tensor:
        """s·B·A as (out, in), fp32."""
        ...

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """`nn.Module.register_parameter`."""
        ...

    def get_parameter(self, target: str) -> nn.Parameter:
        """`nn.Module.get_parameter`."""
        ...


class Variant(Protocol):
    """One way an update meets the base."""

    parameters: tuple[str, ...]
    """Names of the parameters it adds to a layer, beside A and B."""
    frozen: tuple[str, ...]
    """Names among A and B that do not train."""

    def prepare(self, layer: Adapted) -> None:
        """Adds those parameters to `layer`, so that nothing changes while B = 0."""
        ...

    def combine(self, layer: Adapted, base: Tensor, update: Tensor) -> Tensor:
        """The layer's output from the base's (bias included) and the scaled update's, both (..., out)."""
        ...

    def merged_weight(self, layer: Adapted) -> Tensor:
        """The one weight (out, in), fp32, that computes what `combine` does."""
        ...


class Lora:
    """W' = W + s B A (Hu et al. 2021, arXiv:2106.09685, eq. 3)."""

    parameters: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    def prepare(self, layer: Adapted) -> None:
        """Nothing to add."""

    def combine(self, layer: Adapted, base: Tensor, update: Tensor) -> Tensor:
        """base + update."""
        return base + update

    def merged_weight(self, layer: Adapted) -> Tensor:
        """W + s B A."""
        return layer.matrix.float() + layer.delta_matrix()


class LoraFA(Lora):
    """LoRA with A as it was drawn: only B trains (Zhang et al. 2023, arXiv:2308.03303, section 3.1).

    The gradient of B needs A x, of rank r, so the input x is not kept for the backward pass, unless dropout is on (its
    mask then) or the base keeps it: torch's convolutions do. Saved with its A, as any LoRA.
    """

    frozen: tuple[str, ...] = ("A",)


class DoRA:
    r"""Learns a length per output row besides the low-rank direction.

    Computes W' = m * (W + s B A) / ||W + s B A||, the norm over each row (Liu et al. 2024, arXiv:2402.09353,
    eq. 5) and taken as a constant in the backward pass (section 4.3). A bias is added after scaling, so a
    merge leaves it alone.

    Shapes: W (out, in), A (r, in), B (out, r), `magnitude` m (out,).
    """

    parameters: tuple[str, ...] = ("magnitude",)
    frozen: tuple[str, ...] = ()

    def prepare(self, layer: Adapted) -> None:
        """Adds `magnitude`, the row lengths of W: at B = 0 the factor is 1."""
        lengths = _row_lengths(layer.matrix.detach().float())
        layer.register_parameter("magnitude", nn.Parameter(lengths))

    def combine(self, layer: Adapted, base: Tensor, update: Tensor) -> Tensor:
        """Rows of base + update scaled to their learnt lengths, except the bias."""
        factor = self._factor(layer)
        scaled = (base + update) * factor.to(base.dtype)
        bias = layer.bias
        return scaled if bias is None else scaled + (bias * (1 - factor)).to(base.dtype)

    def merged_weight(self, layer: Adapted) -> Tensor:
        """m (W + s B A) / ||W + s B A||."""
        direction = layer.matrix.float() + layer.delta_matrix()
        return direction * self._factor(layer)[:, None]

    def _factor(self, layer: Adapted) -> Tensor:
        with torch.no_grad():
            lengths = _row_lengths(layer.matrix.float() + layer.delta_matrix())
        return layer.get_parameter("magnitude") / lengths


def _row_lengths(weight: Tensor) -> Tensor:
    # A row of zeros (pruned, or never trained) has no direction; length 1 keeps it zero instead of NaN.
    lengths: Tensor = torch.linalg.vector_norm(weight, dim=1)
    return lengths.where(lengths > 0, 1.0)


VARIANTS: dict[str, Variant] = {"lora": Lora(), "dora": DoRA(), "lora_fa": LoraFA()}
"""Name in `lora.variant` → the variant."""
