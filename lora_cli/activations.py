"""Activations that transformers writes out as six operations, as the one that torch has. Knows modules only."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["join_operations"]

_TANH_GELU = ("NewGELUActivation", "FastGELUActivation")
"""transformers' names for GELU by tanh (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2): GPT-2's, T5 1.1's."""


def join_operations(model: nn.Module) -> None:
    """Let every such activation in `model` be computed as one operation: the same up to rounding.

    Six of them each keep a tensor for the backward pass; for GPT-2's shape they were a ninth of a training step.
    """
    from torch.nn import functional

    for module in model.modules():
        if type(module).__name__ in _TANH_GELU:
            module.forward = partial(functional.gelu, approximate="tanh")
