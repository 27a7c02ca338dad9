"""Layers with the names, arguments, parameters and shapes of loralib's. Knows torch only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from lora_cli.errors import ConfigError

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvLoRA", "Embedding", "Linear", "LoRALayer", "MergedLinear"]


class LoRALayer:
    """What the layers have in common, to be mixed into a module.

    With r = 0 a layer is torch's own, all of it trainable; otherwise `weight` is frozen and `lora_A`, `lora_B` train.
    """

    r: int
    """Rank."""
    lora_alpha: float
    """Numerator of the scaling."""
    lora_dropout: Callable[[Tensor], Tensor]
    """Acts on the input of A."""
    merged: bool
    """Always False: `weight` is never changed."""
    merge_weights: bool
    """Kept for scripts that set it; nothing depends on it."""
    scaling: float
    """alpha/r."""
    lora_A: nn.Parameter  # noqa: N815 - the name in the file
    """The factor next to the input."""
    lora_B: nn.Parameter  # noqa: N815
    """The factor next to the output."""

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        if r < 0:
            raise ConfigError("r", r, "0 or more")
        self.r, self.lora_alpha = r, lora_alpha
        # A named function: a layer that keeps a lambda cannot be pickled.
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else _unchanged
        self.merged = False
        self.merge_weights = merge_weights

    @property
    def has_factors(self) -> bool:
        """Whether there is an update: r > 0, and a part of MergedLinear enabled."""
        return hasattr(self, "lora_A")

    def delta_weight(self) -> Tensor:
        """s·B·A in the layout of `weight`."""
        raise NotImplementedError

    def _add_factors(self, weight: Tensor, a_shape: tuple[int, int], b_shape: tuple[int, int]) -> None:
        """Freeze `weight` and put factors of zeros beside it."""
        weight.requires_grad_(False)
        self.lora_A = nn.Parameter(weight.new_zeros(a_shape))
        self.lora_B = nn.Parameter(weight.new_zeros(b_shape))
        self.scaling = self.lora_alpha / self.r

    def _draw_factors(self) -> None:
        if self.has_factors:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)


class Linear(nn.Linear, LoRALayer):
    """y = W x + b + s B A x (Hu et al. 2021, arXiv:2106.09685, eq. 3).

    Shapes: weight (out, in), or (in, out) with fan_in_fan_out; lora_A (r, in), lora_B (out, r).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.fan_in_fan_out = fan_in_fan_out
        self._make_factors()
        # Drawn once more, now with the factors, as in loralib: the same seed gives the same model.
        self.reset_parameters()
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T.contiguous()

    def _make_factors(self) -> None:
        if self.r:
            self._add_factors(self.weight, (self.r, self.in_features), (self.out_features, self.r))

    def reset_parameters(self) -> None:
        """Draw weight and bias as torch does, then A; B becomes zero."""
        nn.Linear.reset_parameters(self)
        self._draw_factors()

    def _update(self, x: Tensor) -> Tensor:
        """B A x."""
        return functional.linear(functional.linear(x, self.lora_A), self.lora_B)

    def _delta(self) -> Tensor:
        """B A, (out, in)."""
        return self.lora_B @ self.lora_A

    def delta_weight(self) -> Tensor:
        """s·B·A in the layout of `weight`."""
        delta = self.scaling * self._delta()
        return delta.T if self.fan_in_fan_out else delta

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        base = functional.linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)
        return base + self._update(self.lora_dropout(x)) * self.scaling if self.has_factors else base


class MergedLinear(Linear):
    """A fused projection of n equal parts, such as GPT-2's query, key and value; the enabled ones have a pair each.

    Shapes, with k parts enabled: lora_A (k·r, in), lora_B (out/n·k, r), one block after the other.

    Raises:
        ConfigError: outputs that are no n equal parts.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        if not enable_lora or out_features % len(enable_lora):
            raise ConfigError("enable_lora", list(enable_lora), f"as many as divide the {out_features} outputs evenly")
        # Before the rest, which makes the factors.
        self.enable_lora = list(enable_lora)
        super().__init__(
            in_features, out_features, r, lora_alpha, lora_dropout, fan_in_fan_out, merge_weights, **kwargs
        )

    def _make_factors(self) -> None:
        num_enabled = sum(self.enable_lora)
        if self.r and num_enabled:
            rows = self.out_features // len(self.enable_lora) * num_enabled
            self._add_factors(self.weight, (self.r * num_enabled, self.in_features), (rows, self.r))

    def _placed(self, parts: Iterable[Tensor], dim: int) -> Tensor:
        """The enabled parts in their places, zeros in the others'."""
        rest = list(parts)
        empty = torch.zeros_like(rest[0])
        return torch.cat([rest.pop(0) if is_enabled else empty for is_enabled in self.enable_lora], dim)

    def _update(self, x: Tensor) -> Tensor:
        k = sum(self.enable_lora)
        reduced = functional.linear(x, self.lora_A).chunk(k, -1)
        return self._placed(map(functional.linear, reduced, self.lora_B.chunk(k)), -1)

    def _delta(self) -> Tensor:
        k = sum(self.enable_lora)
        return self._placed((B @ A for A, B in zip(self.lora_A.chunk(k), self.lora_B.chunk(k), strict=True)), 0)


class Embedding(nn.Embedding, LoRALayer):
    """A table of which each entry seen gets an update; A is zero at the start and B normal.

    Shapes: weight (num, dim), lora_A (r, num), lora_B (dim, r).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, 0.0, merge_weights)
        if r:
            self._add_factors(self.weight, (r, num_embeddings), (embedding_dim, r))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight as torch does, then B; A becomes zero."""
        nn.Embedding.reset_parameters(self)
        if self.has_factors:
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)

    def delta_weight(self) -> Tensor:
        """s·B·A as (num, dim)."""
        return self.scaling * (self.lora_B @ self.lora_A).T

    def forward(self, x: Tensor) -> Tensor:
        """Numbers of entries → (..., dim)."""
        base = nn.Embedding.forward(self, x)
        if not self.has_factors:
            return base
        seen = functional.embedding(x, self.lora_A.T, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        return base + functional.linear(seen, self.lora_B) * self.scaling


class ConvLoRA(nn.Module, LoRALayer):
    """A convolution, kept as `conv`; B A has as many numbers as the kernel, row after row.

    Shapes, kernel (k, ...): lora_A (r·k, in·k), lora_B (out/groups·rest, r·k), rest being the product of the kernel's
    further sizes. Of a square kernel these are loralib's; of Conv1d and Conv3d, which loralib cannot compute, A is.
    """

    def __init__(
        self,
        conv_module: Callable[..., _ConvNd],
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.conv = conv_module(in_channels, out_channels, kernel_size, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        if r:
            first, *others = self.conv.kernel_size
            rows = out_channels // self.conv.groups * math.prod(others)
            self._add_factors(self.conv.weight, (r * first, in_channels * first), (rows, r * first))
        self.reset_parameters()

    @property
    def weight(self) -> Tensor:
        """The convolution's."""
        return self.conv.weight

    @property
    def bias(self) -> Tensor | None:
        """The convolution's."""
        return self.conv.bias

    def reset_parameters(self) -> None:
        """Draw weight and bias as torch does, then A; B becomes zero."""
        self.conv.reset_parameters()
        self._draw_factors()

    def delta_weight(self) -> Tensor:
        """s·B·A in the shape of `weight`."""
        return self.scaling * (self.lora_B @ self.lora_A).view(self.conv.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, ...) → (N, out, ...)."""
        convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor] = self.conv._conv_forward
        if not self.has_factors:
            return convolve(x, self.conv.weight, self.conv.bias)
        if self.lora_dropout is _unchanged or not self.training:
            return convolve(x, self.conv.weight + self.delta_weight(), self.conv.bias)
        base: Tensor = self.conv(x)
        return base + convolve(self.lora_dropout(x), self.delta_weight(), None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A plain convolution's file has `weight` where ours has `conv.weight`; newer loralib's has both.
        for name in ("weight", "bias"):
            if f"{prefix}{name}" in state_dict:
                state_dict.setdefault(f"{prefix}conv.{name}", state_dict.pop(f"{prefix}{name}"))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Conv1d(ConvLoRA):
    """`ConvLoRA` over nn.Conv1d."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv1d, *args, **kwargs)


class Conv2d(ConvLoRA):
    """`ConvLoRA` over nn.Conv2d."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv2d, *args, **kwargs)


class Conv3d(ConvLoRA):
    """`ConvLoRA` over nn.Conv3d."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv3d, *args, **kwargs)


def _unchanged(x: Tensor) -> Tensor:
    return x
