"""How an input meets A and B. Knows one layer; not the model around it, nor files.

Dimensions in names: I in, O out, R rank; leading dimensions are free.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_cli.errors import AdapterError
from lora_cli.nn.variants import SCALINGS, VARIANTS

__all__ = ["LoraLinear", "generator_for"]


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on (seed, module name) only: the same init in any order and any process."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


class LoraLinear(nn.Module):
    r"""A frozen `nn.Linear` and a trained update of rank r (Hu et al. 2021, arXiv:2106.09685).

    y = base(x) + s B A dropout(x), or what the variant makes of the two terms. A is Kaiming-uniform, B zero, so
    a new layer computes exactly what its base does. `A` and `B` stay fp32 and are cast to the input's dtype at
    use. Nothing is merged as a side effect: see `merge` and `unmerge`.

    `weight` is the *effective* weight, with gradients to A and B, because some models bypass `forward`
    (DeBERTa v1's `in_proj.weight`, `nn.MultiheadAttention`'s `out_proj.weight`); dropout does not act there.

    Shapes: A (r, in), B (out, r); input (..., in), output (..., out).
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        *,
        r: int,
        alpha: float,
        scaling: str = "alpha/r",
        dropout: float = 0.0,
        variant: str = "lora",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.r, self.alpha = r, alpha
        self.scaling = SCALINGS[scaling](alpha, r)
        self.variant = variant
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout else nn.Identity()
        device = base_layer.weight.device
        # Drawn on the CPU: a device's own generator would give another init on another device.
        a_RI = torch.empty(r, self.in_features)
        nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
        self.A = nn.Parameter(a_RI.to(device))
        self.B = nn.Parameter(torch.zeros(self.out_features, r, device=device))
        VARIANTS[variant].prepare(self)
        self._unmerged: Tensor | None = None

    @property
    def in_features(self) -> int:
        """Size of an input."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """Size of an output."""
        return self.base_layer.out_features

    @property
    def bias(self) -> nn.Parameter | None:
        """The base's bias."""
        return self.base_layer.bias

    @property
    def weight(self) -> Tensor:
        """The effective weight (out, in) in the base's dtype; computed anew at each reading unless merged."""
        if self.is_merged:
            return self.base_layer.weight
        return VARIANTS[self.variant].merged_weight(self).to(self.base_layer.weight.dtype)

    @property
    def is_merged(self) -> bool:
        """Whether the base weight contains the update."""
        return self._unmerged is not None

    def delta_weight(self) -> Tensor:
        """s·B·A in the base's layout (out, in), fp32, with gradients."""
        with torch.autocast(self.A.device.type, enabled=False):
            return self.scaling * (self.B.float() @ self.A.float())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        base: Tensor = self.base_layer(x)
        if self.is_merged:
            return base
        ax_R = functional.linear(self.dropout(x), self.A.to(x.dtype))
        # Scaled at rank r, where it costs least.
        update = functional.linear(ax_R * self.scaling, self.B.to(x.dtype))
        return VARIANTS[self.variant].combine(self, base, update)

    @torch.no_grad()
    def merge(self) -> float:
        """Write the update into the base weight: computed in fp32, rounded once. Returns the largest change.

        A copy of the base weight is kept for `unmerge`.

        Raises:
            AdapterError: already merged, or the result is not finite (the base is left as it was).
        """
        if self.is_merged:
            raise AdapterError("the adapter is merged already; merging again would add it twice")
        base = self.base_layer.weight
        merged = self.weight
        if not merged.isfinite().all():
            raise AdapterError(f"the merged weight is not finite in {base.dtype}; merge into a base of a wider dtype")
        self._unmerged = base.detach().clone()
        base.copy_(merged)
        return float((merged.float() - self._unmerged.float()).abs().max())

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back, bit for bit.

        Raises:
            AdapterError: not merged.
        """
        if self._unmerged is None:
            raise AdapterError("the adapter is not merged, so it cannot be unmerged")
        self.base_layer.weight.copy_(self._unmerged)
        self._unmerged = None

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return f"r={self.r}, scaling={self.scaling:g}, variant={self.variant}" + ", merged" * self.is_merged
