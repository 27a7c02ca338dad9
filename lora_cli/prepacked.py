"""Weights as a CPU's kernels read them, laid out once and not in every product of few tokens. Knows layers; no models.

Decoding multiplies one token of each text by all weights, and laying out the weight costs as much as the product. With
oneDNN (`mkldnn` in torch), two threads and AVX-512, products of MiniLM's and BERT's shapes take, of 8 to 32 tokens,
0.35 to 0.7 of the time. Products of many tokens gain little, and each other number of tokens is compiled anew there:
they are left to torch. The operations are those that torch's own compiler puts in place of a layer with constant
weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_cli.nn.layers import LoraConv1D
from lora_cli.nn.targets import is_inside

__all__ = ["is_available", "prepack"]

_FEW = 64
"""Tokens up to which a product is by the copy."""
_STEP = 8
"""Beyond so many tokens they are filled up to a multiple of it, lest each number be compiled."""

_KEPT = "_prepacked"


def prepack(model: nn.Module, *, limit_mib: int, skip: Collection[str] = ()) -> int:
    """Let linear layers of `model` take few tokens to a copy of the weight that is laid out beforehand; returns how
    many do.

    Only where no gradients are wanted, and of frozen fp32 weights on a CPU; layer by layer as long as copies fit into
    `limit_mib`, and not in the modules called in `skip`. A copy is made when it is first wanted, and anew once the
    weight was written to. Results are the same up to rounding.
    """
    if not limit_mib or not is_available():
        return 0
    left, found = limit_mib * 2**20, 0
    for module in _linear_layers(model, skip):
        left -= module.get_parameter("weight").nbytes
        if left < 0:
            break
        module.forward = partial(_forward, module, LoraConv1D.fits(module))
        found += 1
    return found


def is_available() -> bool:
    """Whether torch has these operations here, and they pay: with AVX2 alone they were slower."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    x, weight, bias = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3), torch.arange(4.0)
    try:
        found = _product(x, _laid_out(weight), bias)
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(found, functional.linear(x, weight, bias))


def _linear_layers(model: nn.Module, skip: Collection[str]) -> Iterator[nn.Module]:
    for name, module in model.named_modules():
        if is_inside(name, skip) or not (type(module) is nn.Linear or LoraConv1D.fits(module)):
            continue
        weight = module.get_parameter("weight")
        if weight.dtype == torch.float32 and weight.device.type == "cpu":
            yield module


def _forward(module: nn.Module, is_transposed: bool, x: Tensor) -> Tensor:
    """What the layer's own `forward` does."""
    weight, width = module._parameters["weight"], x.shape[-1]
    assert weight is not None
    # Optimizers that take one pass do not count what they write, so a weight that trains has no copy.
    is_plain = weight.requires_grad or torch.is_grad_enabled() or x.dtype != torch.float32 or weight.is_inference()
    if is_plain or not 0 < x.numel() <= _FEW * width:
        plain: Tensor = type(module).forward(module, x)
        return plain
    rows = x.reshape(-1, width)
    missing = -len(rows) % _STEP if len(rows) > _STEP else 0
    filled = functional.pad(rows, (0, 0, 0, missing)) if missing else rows
    product = _product(filled, _copy_of(weight, is_transposed=is_transposed), module._parameters["bias"])
    return product[: len(rows)].view(*x.shape[:-1], -1)


def _copy_of(weight: Tensor, *, is_transposed: bool) -> Tensor:
    """The weight as it is now, laid out. Kept with the weight, which copies of a model may share."""
    source, version, laid_out = weight.__dict__.get(_KEPT, (None, 0, None))
    # The source is held, so that no other tensor comes to lie in its place.
    if source is None or source.data_ptr() != weight.data_ptr() or version != weight._version:
        source = weight.detach()
        laid_out = _laid_out(source.T if is_transposed else source)
        weight.__dict__[_KEPT] = source, weight._version, laid_out
    found: Tensor = laid_out
    return found


def _product(rows: Tensor, laid_out: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, laid_out, bias, "none", [], "")
    return found


def _laid_out(matrix: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous())
    return found
