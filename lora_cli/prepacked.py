"""Linear layers whose products are by oneDNN where that is quicker (see `products`). Knows layers; no models.

Decoding multiplies one token of each text by all weights, and laying out the weight as kernels read it costs as much as
the product. So a copy is laid out once, and products of MiniLM's and BERT's shapes, of 8 to 32 tokens, take 0.35 to 0.7
of the time. Products of many tokens gain little by a copy: they take the weight as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from lora_cli.nn.layers import LoraConv1D
from lora_cli.nn.targets import is_inside
from lora_cli.products import as_kernels_read, is_available, is_whole, product, quick_linear

__all__ = ["laid_out", "prepack"]

_FEW = 64
"""Tokens up to which a product is by the copy."""
_STEP = 8
"""Beyond so many of them they are filled up to a multiple of it, lest each number be compiled."""

_copies = WeakTensorKeyDictionary()
"""Weight, which copies of a model may share → (a view of what was laid out, how often that was written to, the copy).
Not with the weight, because a model can be pickled, and a copy cannot.
"""


def prepack(model: nn.Module, *, limit_mib: int, skip: Collection[str] = (), copies: bool = True) -> int:
    """Let linear layers of `model` compute by oneDNN; returns how many may have a copy of their weight for that.

    Only in fp32 on a CPU, and not in the modules called in `skip`. Many tokens go that way where they are a number that
    products are compiled for, with gradients too. Few do with `copies` and without gradients, by a copy of a frozen
    weight, layer by layer as long as copies fit into `limit_mib`; 0: nothing goes that way. A copy is made when it is
    first wanted, and anew once the weight was written to, unless by way of its `data`, which nobody counts. Results are
    the same up to rounding.
    """
    if not limit_mib or not is_available():
        return 0
    left, found = limit_mib * 2**20 if copies else -1, 0
    for module in _linear_layers(model, skip):
        left -= module.get_parameter("weight").nbytes
        module.forward = partial(_forward, module, LoraConv1D.fits(module), left >= 0)
        found += left >= 0
    return found


@contextmanager
def laid_out(model: nn.Module, *, limit_mib: int) -> Iterator[None]:
    """Within it few tokens meet copies in layers that `prepack` left without; these are let go of at the end."""
    left, without = limit_mib * 2**20, list[partial[Tensor]]()
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, partial) and forward.func is _forward:
            left -= module.get_parameter("weight").nbytes
            if left >= 0 and not forward.args[-1]:
                module.forward = partial(_forward, module, forward.args[1], True)
                without.append(forward)
    try:
        yield
    finally:
        for forward in without:
            module = forward.args[0]
            module.forward = forward
            _copies.pop(module.get_parameter("weight"), None)  # type: ignore[no-untyped-call]


def _linear_layers(model: nn.Module, skip: Collection[str]) -> Iterator[nn.Module]:
    for name, module in model.named_modules():
        if is_inside(name, skip) or not (type(module) is nn.Linear or LoraConv1D.fits(module)):
            continue
        weight = module.get_parameter("weight")
        if weight.dtype == torch.float32 and weight.device.type == "cpu":
            yield module


def _forward(module: nn.Module, is_transposed: bool, has_copy: bool, input: Tensor) -> Tensor:
    """What the layer's own `forward` does, by the name that this gives to its input."""
    x, weight, bias, width = input, module._parameters["weight"], module._parameters["bias"], input.shape[-1]
    assert weight is not None
    num_tokens = x.numel() // width
    if x.dtype == torch.float32:
        # What trains is another weight at each step.
        has_copy = has_copy and not (torch.is_grad_enabled() or weight.requires_grad or weight.is_inference())
        if has_copy and 0 < num_tokens <= _FEW:
            return _by_copy(x.reshape(-1, width), weight, bias, is_transposed=is_transposed).view(*x.shape[:-1], -1)
        if is_whole(num_tokens):
            return quick_linear(x, weight.T if is_transposed else weight, bias)
    plain: Tensor = type(module).forward(module, x)
    return plain


def _by_copy(rows: Tensor, weight: Tensor, bias: Tensor | None, *, is_transposed: bool) -> Tensor:
    missing = -len(rows) % _STEP if len(rows) > _STEP else 0
    whole = functional.pad(rows, (0, 0, 0, missing)) if missing else rows
    return product(whole, _copy_of(weight, is_transposed=is_transposed), bias)[: len(rows)]


def _copy_of(weight: Tensor, *, is_transposed: bool) -> Tensor:
    """The weight as it is now, laid out."""
    source, version, copy = _copies.get(weight, (None, 0, None))  # type: ignore[no-untyped-call]
    # The source is held, so that no other tensor comes to lie in its place.
    if source is None or source.data_ptr() != weight.data_ptr() or version != weight._version:
        source = weight.detach()
        copy = as_kernels_read(source.T if is_transposed else source)
        _copies[weight] = source, weight._version, copy
    found: Tensor = copy
    return found
