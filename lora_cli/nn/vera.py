"""The two random matrices that all layers of a VeRA adapter share. Knows which layers they serve; no file.

What a layer does with them is in `variants.VeRA`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lora_cli.nn.kinds import shape_of

__all__ = ["draw_pair", "widest"]


def widest(model: nn.Module, layers: Iterable[str]) -> tuple[int, int]:
    """(most outputs, most inputs) of any of these layers, adapted or not."""
    rows, columns = zip(*(shape_of(model, name) for name in layers), strict=True)
    return max(rows), max(columns)


def draw_pair(
    r: int, rows: int, columns: int, *, seed: int, device: torch.device | None = None
) -> tuple[nn.Parameter, nn.Parameter]:
    """Frozen A (r, columns) and B (rows, r), Kaiming-uniform (Kopiczko et al. 2023, arXiv:2310.11454, section 3.2).

    They depend on the shapes and `seed` only and are what PEFT draws from its `projection_prng_key`, to the last bit.
    """
    # In this order from one generator of the CPU, on which PEFT relies too.
    generator = torch.Generator().manual_seed(seed)
    A, B = (nn.init.kaiming_uniform_(torch.empty(shape), generator=generator) for shape in ((r, columns), (rows, r)))
    return tuple(nn.Parameter(tensor.to(device), requires_grad=False) for tensor in (A, B))  # type: ignore[return-value]
