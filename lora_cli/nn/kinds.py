"""Every kind of layer that can be adapted. Knows which module is the base of which."""

from __future__ import annotations

from torch import Tensor, nn

from lora_cli.nn.convolutions import LoraConvolution
from lora_cli.nn.embeddings import LoraEmbedding
from lora_cli.nn.layers import LoraConv1D, LoraLayer, LoraLinear
from lora_cli.nn.quantized import LoraQuantizedLinear

__all__ = ["KINDS", "is_projection", "kind_of", "matrix_of", "shape_of"]

KINDS: tuple[type[LoraLayer], ...] = (LoraLinear, LoraConv1D, LoraEmbedding, LoraConvolution, LoraQuantizedLinear)
"""In no order that matters: at most one fits a module."""


def kind_of(module: nn.Module) -> type[LoraLayer] | None:
    """The kind of adapted layer that `module` can be the base of, if any."""
    return next((kind for kind in KINDS if kind.fits(module)), None)


def is_projection(model: nn.Module, name: str) -> bool:
    """Whether a layer that can be adapted multiplies a vector by a matrix."""
    kind = kind_of(model.get_submodule(name))
    return kind is not None and kind.is_projection


def matrix_of(model: nn.Module, name: str) -> Tensor:
    """The weight (out, in) of a layer that is adapted or can be; while it is merged, the merged one."""
    module = model.get_submodule(name)
    if isinstance(module, LoraLayer):
        return module.matrix
    kind = kind_of(module)
    assert kind is not None
    return kind.matrix_of(module)


def shape_of(model: nn.Module, name: str) -> tuple[int, int]:
    """(out, in) of such a layer, for less than the weight costs where that is quantised."""
    module = model.get_submodule(name)
    base = module.base_layer if isinstance(module, LoraLayer) else module
    kind = type(module) if isinstance(module, LoraLayer) else kind_of(base)
    assert kind is not None
    return kind.shape_of(base)
