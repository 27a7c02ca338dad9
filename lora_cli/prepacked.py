"""Weights as a CPU's kernels read them, laid out once and not in every product of a few tokens. Knows torch only.

Decoding multiplies one token of each text by all weights, and laying out the weight costs as much as the product. With
oneDNN (`mkldnn` in torch), two threads and AVX-512, products of MiniLM's and BERT's shapes take, of 8 to 32 tokens,
0.35 to 0.7 of the time. Products of many tokens gain little, and each other number of tokens is compiled anew there:
they are left to torch. The operations are those that torch's own compiler puts in place of a layer with constant
weights.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["prepack"]

_FEW = 64
"""Tokens up to which a product is by the copy."""
_STEP = 8
"""Beyond so many tokens they are filled up to a multiple of it, lest each number be compiled."""


def prepack(model: nn.Module, *, limit_mib: int, skip: Collection[str] = ()) -> int:
    """Let linear layers of `model` take few tokens to a copy of the weight that is laid out beforehand; returns how
    many do.

    Only where no gradients are wanted, and of fp32 weights on a CPU; layer by layer as long as the copies fit into
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
        module.prepacked = _Prepacked(is_transposed=_is_conv1d(module))  # type: ignore[assignment]
        module.forward = partial(_forward, module)
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
        if type(module) is not nn.Linear and not _is_conv1d(module):
            continue
        weight = module.get_parameter("weight")
        is_skipped = any(name == each or name.startswith(f"{each}.") for each in skip)
        if not is_skipped and weight.dtype == torch.float32 and weight.device.type == "cpu":
            yield module


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' `Conv1D`, a Linear whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


class _Prepacked:
    """The copy of one layer's weight."""

    def __init__(self, *, is_transposed: bool) -> None:
        self._is_transposed = is_transposed
        self._source: Tensor | None = None
        """The weight that it is of; held, so that no other comes to lie in its place."""
        self._version = 0
        self._laid_out = torch.empty(0)

    def __deepcopy__(self, memo: object) -> _Prepacked:
        # A copy of a model shares the weights; where it does not, it will notice.
        return copy.copy(self)

    def of(self, weight: Tensor) -> Tensor:
        """The copy of the weight as it is now."""
        source = self._source
        if source is None or source.data_ptr() != weight.data_ptr() or self._version != weight._version:
            self._source, self._version = weight.detach(), weight._version
            self._laid_out = _laid_out(self._source.T if self._is_transposed else self._source)
        return self._laid_out


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    """What the layer's own `forward` does."""
    weight, width = module._parameters["weight"], x.shape[-1]
    assert weight is not None
    is_few = 0 < x.numel() <= _FEW * width
    if not is_few or torch.is_grad_enabled() or x.dtype != torch.float32 or weight.is_inference():
        plain: Tensor = type(module).forward(module, x)
        return plain
    prepacked: _Prepacked = module.__dict__["prepacked"]
    rows = x.reshape(-1, width)
    missing = -len(rows) % _STEP if len(rows) > _STEP else 0
    filled = functional.pad(rows, (0, 0, 0, missing)) if missing else rows
    product = _product(filled, prepacked.of(weight), module._parameters["bias"])
    return product[: len(rows)].view(*x.shape[:-1], -1)


def _product(rows: Tensor, laid_out: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, laid_out, bias, "none", [], "")
    return found


def _laid_out(matrix: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous())
    return found
