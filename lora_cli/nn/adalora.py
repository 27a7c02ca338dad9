"""AdaLoRA's budget: which ranks of which layers stay, decided while training. Knows layers; not the loop nor files.

What a layer does with its singular values is in `variants.AdaLoRA`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_cli.nn.layers import LoraLayer
from lora_cli.spec import AdaLoraSpec

__all__ = ["Allocator", "KeptRanks"]


_FACTORS = ("E", "A", "B")
_State = dict[Tensor, dict[str, Tensor]]


class Allocator:
    """Spends a shrinking number of ranks where they matter most (Zhang et al. 2023, arXiv:2303.10512, algorithm 1).

    The averages that it judges by lie in the optimizer's state, beside AdamW's own, and so in every checkpoint.
    """

    def __init__(self, layers: Iterable[LoraLayer], spec: AdaLoraSpec) -> None:
        self._layers, self._spec = list(layers), spec

    def penalty(self) -> Tensor:
        """How far A and B are from orthonormal, times `orthogonality`: eq. 4, as a mean of norms like the authors'."""
        grams = [gram for layer in self._layers for gram in (layer.A @ layer.A.T, layer.B.T @ layer.B)]
        norms = [torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams]
        return self._spec.orthogonality * torch.stack(norms).mean()

    def budget(self, step: int, total: int) -> int:
        """Ranks of all layers together that stay after `step` steps (from 1) of `total`: eq. 12."""
        most = sum(layer.r for layer in self._layers)
        least = len(self._layers) * self._spec.target_r
        first, last = self._spec.start * total, (1 - self._spec.end) * total
        left = min(1.0, max(0.0, (last - step) / (last - first)))
        return least + math.floor((most - least) * left**3)

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, step: int, total: int) -> None:
        """Judge by the gradients of the step just taken, and zero the singular values that the budget leaves out.

        In the last phase nothing is judged any more, so that the same ones stay zero.
        """
        is_last_phase = step >= (1 - self._spec.end) * total
        for layer in self._layers if not is_last_phase else ():
            for name in _FACTORS:
                self._observe(layer.get_parameter(name), optimizer.state)
        if not is_last_phase and step % self._spec.interval:
            return
        scores = torch.stack([_score(layer, optimizer.state) for layer in self._layers])
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept.view(-1)[scores.flatten().topk(self.budget(step, total)).indices] = True
        for layer, mask in zip(self._layers, kept, strict=True):
            layer.get_parameter("E").mul_(mask)

    def _observe(self, parameter: nn.Parameter, state: _State) -> None:
        """Smooth a parameter's sensitivity and its uncertainty: eq. 8 to 10."""
        if parameter.grad is None:
            return  # No input has reached its layer.
        own, found = state[parameter], (parameter * parameter.grad).abs()
        sensitivity = own.setdefault("sensitivity", torch.zeros_like(found))
        sensitivity.lerp_(found, 1 - self._spec.beta1)
        uncertainty = own.setdefault("uncertainty", torch.zeros_like(found))
        uncertainty.lerp_((found - sensitivity).abs(), 1 - self._spec.beta2)


def _score(layer: LoraLayer, state: _State) -> Tensor:
    """Importance (r,) of each singular value with its two vectors: eq. 7 and 11."""
    E, A, B = (_importance(layer.get_parameter(name), state) for name in _FACTORS)
    return E + A.mean(1) + B.mean(0)


def _importance(parameter: nn.Parameter, state: _State) -> Tensor:
    own = state[parameter]
    return own["sensitivity"] * own["uncertainty"] if "sensitivity" in own else torch.zeros_like(parameter)


@dataclass(frozen=True)
class KeptRanks:
    """How a factor stands in PEFT's file, which holds the ranks that stayed only, and E as a column."""

    outside: ClassVar[str] = "has ranks that its rank_pattern leaves out"
    """What is wrong with a tensor in a file that `spread` would not have made."""

    own_shape: tuple[int, ...]
    """Ours, with all ranks."""
    kept: tuple[int, ...]
    """Numbers of the ranks in the file."""
    dimension: int
    """Where the ranks are in it."""
    is_column: bool = False
    """Whether the file has a second dimension of 1."""

    @property
    def shape(self) -> tuple[int, ...]:
        """In the file."""
        sizes = list(self.own_shape)
        sizes[self.dimension] = len(self.kept)
        return (*sizes, 1) if self.is_column else tuple(sizes)

    def spread(self, own: Tensor) -> Tensor:
        """Our tensor in the file's shape."""
        return own.index_select(self.dimension, torch.tensor(self.kept, dtype=torch.long)).reshape(self.shape)

    def gather(self, spread: Tensor) -> Tensor:
        """Ours, zero for the ranks that are not in the file."""
        own, index = spread.new_zeros(self.own_shape), torch.tensor(self.kept, dtype=torch.long)
        return own.index_copy_(self.dimension, index, spread[..., 0] if self.is_column else spread)
