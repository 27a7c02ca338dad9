"""How much of its rank an update uses: the singular values of s·B·A from its factors. Knows no base weight and no file.

Dimensions in names: I in, O out, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lora_cli.nn.stored import StoredAdapter

__all__ = ["Spectrum", "singular_values", "spectra", "suggested_ranks"]


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one update, largest first."""

    layer: str
    """Name of the layer."""
    part: str
    """Part of a fused projection; "" for a whole layer."""
    values: tuple[float, ...]
    """As many as its rank."""

    @property
    def name(self) -> str:
        """The layer, with its part as `lora.targets` names it."""
        return f"{self.layer}:{self.part}" if self.part else self.layer

    @property
    def r(self) -> int:
        """Its rank."""
        return len(self.values)

    @property
    def norm(self) -> float:
        """Frobenius norm of the update."""
        return math.hypot(*self.values)

    @property
    def energy(self) -> tuple[float, ...]:
        """Share of the squared norm that the best update of rank 1, 2, ... keeps (Eckart and Young 1936)."""
        total = self.norm**2
        return tuple(kept / total if total else 1.0 for kept in accumulate(value**2 for value in self.values))

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the values' shares of their sum (Roy and Vetterli 2007, EUSIPCO); 0 for no update."""
        total = sum(self.values)
        shares = [value / total for value in self.values if value > 0] if total else []
        return math.exp(-sum(share * math.log(share) for share in shares)) if shares else 0.0

    def rank_at(self, energy: float) -> int:
        """The smallest rank, 1 or more, whose best update keeps this share."""
        # The last share is 1 but for rounding.
        return next((k for k, kept in enumerate(self.energy, 1) if kept >= energy), self.r)


def singular_values(A_RI: Tensor, B_OR: Tensor) -> Tensor:
    """The r singular values of B·A, largest first, from two QR decompositions; nothing (out, in) is made."""
    left = torch.linalg.qr(B_OR, mode="r").R
    right = torch.linalg.qr(A_RI.T, mode="r").R
    values: Tensor = torch.linalg.svdvals(left @ right.T)
    missing = A_RI.shape[0] - len(values)
    return torch.cat([values, values.new_zeros(missing)])


def spectra(stored: StoredAdapter) -> list[Spectrum]:
    """The spectrum of every update, largest norm first; of DoRA that of s·B·A, before rows get their lengths."""
    found = [spectrum for name in stored.layers for spectrum in _of_layer(stored, name)]
    return sorted(found, key=lambda spectrum: (-spectrum.norm, spectrum.name))


def suggested_ranks(found: Iterable[Spectrum], energy: float) -> dict[str, int]:
    """Layer → the smallest rank that keeps this share, in each of its parts, sorted by name."""
    ranks: dict[str, int] = {}
    for spectrum in found:
        ranks[spectrum.layer] = max(ranks.get(spectrum.layer, 1), spectrum.rank_at(energy))
    return dict(sorted(ranks.items()))


def _of_layer(stored: StoredAdapter, name: str) -> Iterator[Spectrum]:
    A_RI, B_OR = stored.layers[name].matrices()
    parts: Sequence[str] = stored.parts[name].parts if name in stored.parts else ("",)
    # Each part has its own rows of A and columns of B, and B is zero outside of its outputs.
    for part, A, B in zip(parts, A_RI.chunk(len(parts)), B_OR.chunk(len(parts), dim=1), strict=True):
        yield Spectrum(name, part, tuple(singular_values(A, B).tolist()))
