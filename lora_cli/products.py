"""Products by oneDNN (`mkldnn` in torch) where it is quicker than what torch takes. Knows tensors only.

With AVX-512, on a processor of AMD and with two threads, products of 96 to 1,000 tokens with weights as they are took
0.71 to 0.91 of the time, both directions together (widths of 384 to 2,048). Each number of tokens is compiled anew
there, though: a few ms and MiB for all products of a model. So a sequence is filled up to one of few numbers, and any
other is left to torch. The operations are those that torch's own compiler puts in place of a layer with constant
weights.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["as_kernels_read", "filled", "is_available", "is_whole", "product", "quick_linear"]

_MANY = 64
"""Tokens from which numbers are filled up."""
_PER_OCTAVE = 16
"""Numbers of tokens between one power of two and the next: what is filled in is 2 % on average."""


@functools.cache
def is_available() -> bool:
    """Whether torch has these operations here, and they pay: with AVX2 alone they were slower."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    x, weight, bias = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3), torch.arange(4.0)
    try:
        with torch.autocast("cpu", enabled=False):
            return torch.allclose(product(x, as_kernels_read(weight), bias), functional.linear(x, weight, bias))
    except (AttributeError, RuntimeError):
        return False


def filled(num_tokens: int) -> int:
    """The next number of tokens, or this one, that products are compiled for; few tokens stay as many as they are."""
    if num_tokens < _MANY or not is_available():
        return num_tokens
    step = (1 << (num_tokens - 1).bit_length()) // (2 * _PER_OCTAVE)
    return -(-num_tokens // step) * step


def is_whole(num_tokens: int) -> bool:
    """Whether products of so many tokens are compiled."""
    return num_tokens >= _MANY and filled(num_tokens) == num_tokens


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(rows, in) → (rows, out), by a weight (out, in) that may be laid out; without gradients."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return found


def as_kernels_read(matrix: Tensor) -> Tensor:
    """A copy of a weight (out, in) as kernels read it."""
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous())
    return found


def quick_linear(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """`functional.linear` with a weight (out, in)."""
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, matrix, bias)):
        found: Tensor = _Linear.apply(rows, matrix, bias)  # type: ignore[no-untyped-call]
    else:
        found = product(rows, matrix, bias)
    return found.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, matrix)
        return product(rows, matrix, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (rows, matrix), wanted = grads, ctx.saved_tensors, ctx.needs_input_grad
        return (
            product(grad, matrix.T, None) if wanted[0] else None,
            grad.T @ rows if wanted[1] else None,
            grad.sum(0) if wanted[2] else None,
        )
