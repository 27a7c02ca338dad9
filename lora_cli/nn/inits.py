"""Where A and B start. Knows matrices; not layers, models or files.

Most start with B A = 0. A *residual* init starts with factors A0, B0 of the base weight itself. The base stays as it
is, and the update is what training changes of their product:

    s (B A - B0 A0) = s ((B - B0) A + B0 (A - A0)),

the right side being exactly 0 at the start and as exact as A and B later. The gradients are those of the papers, which
take s B0 A0 off the base weight instead. It costs a second pair of rank r in the forward pass, and such an adapter is
saved as the LoRA of rank 2r that it is, for the base as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lora_cli.errors import ConfigError

__all__ = [
    "INITS",
    "Block",
    "Eva",
    "Gaussian",
    "Init",
    "Kaiming",
    "Loftq",
    "Noise",
    "Olora",
    "Orthogonal",
    "Pissa",
    "check_init",
]


@dataclass(frozen=True)
class Block:
    """A layer, one of its adapted parts or one of its groups, before it starts; r' is its share of the rank."""

    A: Tensor
    """(r', in), zero, fp32; to be filled."""
    B: Tensor
    """(out, r'), zero, fp32; to be filled."""
    r: int
    """Rank of the layer."""
    scaling: float
    """s."""
    weight: Callable[[], Tensor]
    """The base weight (out, in), fp32."""
    original: Callable[[], Tensor]
    """What the base weight was before it was quantised (out, in), fp32."""
    generator: torch.Generator | None
    """Draws, on the CPU."""


class Init(Protocol):
    """One way to start."""

    is_residual: bool
    """Whether it starts from a part of the base weight, which the update then leaves out."""
    is_neutral: bool
    """Whether a fresh layer computes what its base does."""
    needs_inputs: bool
    """Whether A stays 0, so that nothing would train, until `start_from_inputs`."""

    def start(self, block: Block) -> None:
        """Fill `block.A` and `block.B`."""
        ...


class Kaiming:
    """A uniform in ±1/√in, as nn.Linear is; B = 0 (loralib's, and PEFT's default). An embedding has A = 0, B normal."""

    is_residual, is_neutral, needs_inputs = False, True, False

    def start(self, block: Block) -> None:
        """Draw A."""
        nn.init.kaiming_uniform_(block.A, a=math.sqrt(5), generator=block.generator)


class Gaussian:
    """A ~ N(0, 1/r²), B = 0 (PEFT's "gaussian"). An embedding has A = 0, B normal, there too."""

    is_residual, is_neutral, needs_inputs = False, True, False

    def start(self, block: Block) -> None:
        """Draw A."""
        nn.init.normal_(block.A, std=1 / block.r, generator=block.generator)


class Orthogonal:
    """A and B random in orthogonal halves of the rank, so that neither is 0, but B A is, up to rounding.

    With Q (r, r) orthogonal, A = 0.1 Q_oddᵀ X and B = 0.1 Y Q_even, X and Y normal (PEFT's "orthogonal").
    """

    is_residual, is_neutral, needs_inputs = False, True, False

    def start(self, block: Block) -> None:
        """Draw both; the rank is even."""
        rank, columns = block.A.shape
        Q, _ = torch.linalg.qr(_normal(rank, rank, block.generator))
        block.A.copy_(0.1 * Q[0::2].T @ _normal(rank // 2, columns, block.generator))
        block.B.copy_(0.1 * _normal(len(block.B), rank // 2, block.generator) @ Q[1::2])


class Pissa:
    """The r largest singular values and their vectors, s B A = U_r S_r V_rᵀ (Meng et al. 2024, arXiv:2404.02948).

    A and B have √(S_r / s) each (eq. 2 and 3, with s in them as in PEFT).
    """

    is_residual, is_neutral, needs_inputs = True, True, False

    def start(self, block: Block) -> None:
        """Take the weight apart."""
        _halve(block, block.weight())


class Olora:
    """B and A are the first r columns of Q and rows of R, with W = Q R (Büyükakyüz 2024, arXiv:2406.01775, section 3).

    As in PEFT, s B A is what the update starts from.
    """

    is_residual, is_neutral, needs_inputs = True, True, False

    def start(self, block: Block) -> None:
        """Take the weight apart. Its first r columns alone make the first r of Q."""
        weight = block.weight()
        Q, _ = torch.linalg.qr(weight[:, : len(block.A)])
        block.A.copy_(Q.T @ weight)
        block.B.copy_(Q)


class Eva:
    """A is the r largest right singular vectors of the layer's inputs, B = 0 (Paischer et al. 2024, arXiv:2410.07170).

    Found by `start_from_inputs`. Ranks are not moved from layer to layer (rho = 1).
    """

    is_residual, is_neutral, needs_inputs = False, True, True

    def start(self, block: Block) -> None:
        """Nothing to start from yet."""


class Loftq:
    """What quantising took off the weight, as far as rank r goes (Li et al. 2023, arXiv:2310.08659, algorithm 1).

    One step of the alternation (T = 1), which quantises W itself, so that the base stays the ordinary quantisation of
    the checkpoint: s B A = U_r S_r V_rᵀ of W - dequantised(W), no other matrix of rank r being as near to that (Eckart
    and Young 1936). A fresh adapter is not neutral then, but nearer to the model as it was.
    """

    is_residual, is_neutral, needs_inputs = False, False, False

    def start(self, block: Block) -> None:
        """Take the difference apart."""
        weight = block.weight()
        _halve(block, block.original().to(weight.device) - weight)


@dataclass(frozen=True)
class Noise:
    """A and B ~ N(0, std²), for a variant with a zero of its own between them."""

    std: float
    is_residual = False
    is_neutral = True
    needs_inputs = False

    def start(self, block: Block) -> None:
        """Draw A, then B."""
        for tensor in (block.A, block.B):
            nn.init.normal_(tensor, std=self.std, generator=block.generator)


INITS: dict[str, Init] = {
    "kaiming": Kaiming(),
    "gaussian": Gaussian(),
    "orthogonal": Orthogonal(),
    "pissa": Pissa(),
    "olora": Olora(),
    "eva": Eva(),
    "loftq": Loftq(),
}
"""Name in `lora.init` → the init."""

_FOR_EMBEDDINGS = ("kaiming", "gaussian")


def check_init(
    init: str, name: str, r: int, *, is_embedding: bool, is_projection: bool, has_original: bool = False
) -> None:
    """That the layer called `name` can start so, with rank `r` in each group.

    Raises:
        ConfigError: it cannot.
    """
    if is_embedding and init not in _FOR_EMBEDDINGS:
        raise ConfigError("lora.init", init, f"not for an embedding ({name}); {' or '.join(_FOR_EMBEDDINGS)}")
    if INITS[init].needs_inputs and not is_projection:
        raise ConfigError("lora.init", init, f"not for a convolution ({name}), whose inputs overlap")
    if init == "orthogonal" and r % 2:
        raise ConfigError("lora.init", init, f"needs an even rank in each group; {name} has {r}")
    if init == "loftq" and not has_original:
        raise ConfigError("lora.init", init, f"only for layers that model.quantization has just quantised, not {name}")


def _halve(block: Block, matrix: Tensor) -> None:
    """s B A = the best approximation of `matrix` by its rank, each factor with √(S / s)."""
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    r = len(block.A)
    roots = (S[:r] / block.scaling).sqrt()
    block.A.copy_(roots[:, None] * V[:r])
    block.B.copy_(U[:, :r] * roots)


def _normal(rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn(rows, columns, generator=generator)
