"""How an input meets A and B. Knows one layer; not the model around it, nor files.

Dimensions in names: I in, O out, R rank; leading dimensions are free.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_cli.dropout import quicken
from lora_cli.errors import AdapterError
from lora_cli.nn.autocast import without_autocast
from lora_cli.nn.dylora import DrawnRank
from lora_cli.nn.fused import Placement
from lora_cli.nn.inits import INITS, Block
from lora_cli.nn.variants import VARIANTS, Lora, Measured

__all__ = ["LoraConv1D", "LoraLayer", "LoraLinear", "generator_for"]


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on (seed, module name) only: the same init in any order and any process."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


class LoraLayer(nn.Module):
    r"""A frozen layer with one weight and a trained update of rank r (Hu et al. 2021, arXiv:2106.09685).

    y = base(x) + s B A x, or what the variant makes of the two terms; a new layer computes exactly what its base
    does. `A` and `B` stay fp32 and are cast at use. Nothing is merged as a side effect: see `merge` and `unmerge`.
    With a `placement`, only the parts of a fused projection that it names are adapted, each by an A and a B of its
    own, as in loralib's MergedLinear.

    `weight` is the *effective* weight, with gradients to A and B, because some models bypass `forward`
    (DeBERTa v1's `in_proj.weight`, `nn.MultiheadAttention`'s `out_proj.weight`); dropout does not act there.

    Shapes: A (r, in), B (out, r); with k parts, of P outputs together, A (k·r, in), B (P, r). A pair that layers share
    is as large as the widest of them, and each uses its first columns and rows.
    """

    A0: Tensor | None
    B0: Tensor | None

    is_transposed: ClassVar[bool] = False
    """Whether the base keeps its weight as (in, out)."""
    is_projection: ClassVar[bool] = True
    """Whether it multiplies a vector by a matrix, and so belongs to all-linear."""

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        r: int,
        alpha: float,
        scaling: str = "alpha/r",
        dropout: float = 0.0,
        variant: str = "lora",
        init: str = "kaiming",
        placement: Placement | None = None,
        generator: torch.Generator | None = None,
        shared: tuple[nn.Parameter, nn.Parameter] | None = None,
    ) -> None:
        super().__init__()
        assert placement is None or VARIANTS[variant].scope == "any", "refused by name where the layer is chosen"
        assert (shared is not None) == VARIANTS[variant].is_shared, "one pair is drawn for all layers, by `draw_pair`"
        self.base_layer = base_layer.requires_grad_(False)
        self.r, self.alpha = r, alpha
        self.variant, self.init, self._scaling_rule = variant, init, scaling
        self.scaling = self.scaling_at(r)
        self.drawn_rank: DrawnRank | None = None
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout else nn.Identity()
        quicken(self.dropout)
        self.placement = placement
        self.A, self.B = shared or self._new_pair(generator)
        self.placement = None if placement is None else placement.to(self.device)
        starts = (self.A.detach().clone(), self.B.detach().clone()) if INITS[init].is_residual else (None, None)
        # No results of training: the base weight tells them, so they are in no state and no file.
        self.register_buffer("A0", starts[0], persistent=False)
        self.register_buffer("B0", starts[1], persistent=False)
        for name in VARIANTS[variant].frozen:
            self.get_parameter(name).requires_grad_(False)
        self.measured: Measured | None = None
        VARIANTS[variant].prepare(self)
        self._unmerged: Tensor | None = None

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether `module` is a base for this kind of layer."""
        raise NotImplementedError

    def _new_pair(self, generator: torch.Generator | None) -> tuple[nn.Parameter, nn.Parameter]:
        placed, device = self.placement, self.device
        num_parts, num_rows = (len(placed.parts), placed.num_rows) if placed else (1, self.out_features)
        # Drawn on the CPU: a device's own generator would give another init on another device.
        where = "meta" if device.type == "meta" else "cpu"
        a_RI = torch.zeros(num_parts * self.r, self.in_features, device=where)
        b_OR = torch.zeros(num_rows, self.r // self.num_groups, device=where)
        # A model without weights is only counted.
        if where == "cpu":
            self._draw(a_RI, b_OR, generator)
        return nn.Parameter(a_RI.to(device)), nn.Parameter(b_OR.to(device))

    def _draw(self, a_RI: Tensor, b_OR: Tensor, generator: torch.Generator | None) -> None:
        """Let two zero matrices start as `init` says, each part and group by itself."""
        start, blocks = VARIANTS[self.variant].start or INITS[self.init], self._blocks()
        for a_rI, (rows, outputs) in zip(a_RI.chunk(len(blocks)), blocks, strict=True):
            b_Or = torch.zeros(len(rows), b_OR.shape[1])
            weight, original = (partial(self._rows_of, name, outputs) for name in ("matrix", "original"))
            start.start(Block(a_rI, b_Or, self.r, self.scaling, weight, original, generator))
            b_OR[rows] = b_Or

    def _blocks(self) -> list[tuple[Tensor, Tensor]]:
        """Of each part or group its rows of B and its outputs."""
        if self.placement is None:
            return [(rows, rows) for rows in torch.arange(self.out_features).chunk(self.num_groups)]
        rows = [(self.placement.part == number).nonzero()[:, 0] for number in range(len(self.parts))]
        return [(each, self.placement.rows[each]) for each in rows]

    def _rows_of(self, name: str, outputs: Tensor) -> Tensor:
        matrix: Tensor = getattr(self, name).detach()
        return matrix[outputs.to(matrix.device)].float()

    def _reduce(self, x: Tensor) -> Tensor:
        """(..., in) → A x (..., r), in the dtype in which the layer computes."""
        return functional.linear(self.dropout(x), self._placed_a().to(x.dtype))

    def _whole_a(self) -> Tensor:
        """A of the update: of a residual init [A; A - A0] in each part and group (2r, in), else A."""
        if self.A0 is None:
            return self.A
        blocks = len(self.parts) or self.num_groups
        pairs = zip(self.A.chunk(blocks), (self.A - self.A0).chunk(blocks), strict=True)
        return torch.cat([each for pair in pairs for each in pair])

    def _whole_b(self) -> Tensor:
        """B of the update: of a residual init [B - B0, B0] (out, 2r), else B."""
        return self.B if self.B0 is None else torch.cat([self.B - self.B0, self.B0], dim=1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) whose s B A is the update, with gradients: of rank 2r if `init` is residual, see `inits`.

        What layers share is given whole.
        """
        return self._whole_a(), self._whole_b()

    @classmethod
    def matrix_of(cls, base_layer: nn.Module) -> Tensor:
        """The weight of a base of this kind as (out, in): a view."""
        weight = base_layer.get_parameter("weight")
        return weight.T if cls.is_transposed else weight

    @classmethod
    def shape_of(cls, base_layer: nn.Module) -> tuple[int, int]:
        """(out, in) of a base of this kind."""
        rows, columns = cls.matrix_of(base_layer).shape
        return rows, columns

    @classmethod
    def groups_of(cls, base_layer: nn.Module) -> int:
        """In how many groups a base of this kind computes: 1, or a convolution's."""
        return 1

    @property
    def num_groups(self) -> int:
        """Groups of outputs, each with its share of A's rows."""
        return self.groups_of(self.base_layer)

    @property
    def _base_weight(self) -> nn.Parameter:
        return self.base_layer.get_parameter("weight")

    @property
    def device(self) -> torch.device:
        """Where the base layer is."""
        return self._base_weight.device

    @property
    def matrix(self) -> Tensor:
        """The base weight as (out, in)."""
        return self.matrix_of(self.base_layer)

    @property
    def original(self) -> Tensor:
        """The base weight before it was quantised, as (out, in)."""
        return self.matrix

    @property
    def in_features(self) -> int:
        """Size of an input."""
        return self.shape_of(self.base_layer)[1]

    @property
    def out_features(self) -> int:
        """Size of an output."""
        return self.shape_of(self.base_layer)[0]

    @property
    def training_rank(self) -> int | None:
        """The rank that this step trains; None: all of it, and always outside of training."""
        return self.drawn_rank.current if self.drawn_rank and self.training else None

    def scaling_at(self, r: int) -> float:
        """s of an update of rank r."""
        return VARIANTS[self.variant].scaling(self._scaling_rule, self.alpha, r)

    @property
    def parts(self) -> tuple[str, ...]:
        """The adapted parts of a fused projection; empty: the whole layer."""
        return self.placement.parts if self.placement else ()

    @property
    def bias(self) -> nn.Parameter | None:
        """The base's bias."""
        bias: nn.Parameter | None = getattr(self.base_layer, "bias", None)
        return bias

    @property
    def weight(self) -> Tensor:
        """The effective weight in the base's layout and dtype; computed anew at each reading unless merged."""
        if self.is_merged:
            return self._base_weight
        return self._in_layout(VARIANTS[self.variant].merged_weight(self)).to(self._base_weight.dtype)

    @property
    def is_merged(self) -> bool:
        """Whether the base weight contains the update."""
        return self._unmerged is not None

    def _in_layout(self, matrix: Tensor) -> Tensor:
        return matrix.T if self.is_transposed else matrix

    def _placed_a(self) -> Tensor:
        """A for the inputs that there are: where it is shared with wider layers, its first columns."""
        return self._whole_a()[:, : self.in_features]

    def _placed_b(self) -> Tensor:
        """B for all outputs: with parts, its blocks in their places (out, k·r)."""
        B = self._whole_b()
        return B[: self.out_features] if self.placement is None else self.placement.spread(B)

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """(A, B) of which the layer adds s B A x to its base's output, with gradients; None: it does something else."""
        variant = VARIANTS[self.variant]
        if not self.is_projection or type(variant).combine is not Lora.combine:
            return None
        b_OR, core_R = self._placed_b(), variant.core(self)
        return self._placed_a(), b_OR if core_R is None else b_OR * core_R

    def delta_matrix(self) -> Tensor:
        """s·(B · core)·A as (out, in), fp32, with gradients."""
        with without_autocast(self.A):
            b_OR, core_R = self._placed_b().float(), VARIANTS[self.variant].core(self)
            return self.scaling * ((b_OR if core_R is None else b_OR * core_R) @ self._placed_a().float())

    def delta_weight(self) -> Tensor:
        """`delta_matrix` in the base's layout."""
        return self._in_layout(self.delta_matrix())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in), or indices for an embedding, → (..., out)."""
        base: Tensor = self.base_layer(x)
        return base if self.is_merged else self.adapted(x, base)

    def adapted(self, x: Tensor, base: Tensor) -> Tensor:
        """The layer's output from the base's, unmerged."""
        if (pair := self.pair()) is not None:
            A, B = pair
            return _plus(base, functional.linear(self.dropout(x), A.to(x.dtype)), B, self.scaling)
        # Scaled at rank r, where it costs least.
        ax_R, core_R = self._reduce(x) * self.scaling, VARIANTS[self.variant].core(self)
        update = self._expand(ax_R if core_R is None else ax_R * core_R.to(ax_R.dtype))
        return VARIANTS[self.variant].combine(self, base, update)

    def _expand(self, ax_R: Tensor) -> Tensor:
        """(..., r) → B A x (..., out)."""
        return functional.linear(ax_R, self._placed_b().to(ax_R.dtype))

    @torch.no_grad()
    def truncate(self, r: int) -> None:
        """Keep the first `r` rows of A and columns of B only, with the scaling of that rank."""
        assert not self.parts, "parts have ranks of their own"
        self.A, self.B = nn.Parameter(self.A[:r].clone()), nn.Parameter(self.B[:, :r].clone())
        self.r, self.scaling = r, self.scaling_at(r)

    @torch.no_grad()
    def merge(self) -> float:
        """Put the update into the base: computed in fp32, rounded once. Returns the largest change of a weight.

        What the base was is kept for `unmerge`.

        Raises:
            AdapterError: already merged, or the result is not finite (the base is left as it was).
        """
        if self.is_merged:
            raise AdapterError("the adapter is merged already; merging again would add it twice")
        if self.drawn_rank:
            self.drawn_rank.current = None  # What a last step trained is not all there is to merge.
        merged = self.weight
        if not merged.isfinite().all():
            raise AdapterError(f"the merged weight is not finite in {merged.dtype}; merge into a base of a wider dtype")
        return float((merged.float() - self._replace(merged).float()).abs().max())

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base back, bit for bit.

        Raises:
            AdapterError: not merged.
        """
        if not self.is_merged:
            raise AdapterError("the adapter is not merged, so it cannot be unmerged")
        self._restore()

    def _replace(self, merged: Tensor) -> Tensor:
        """Make this the base's weight, in its layout and dtype; returns the one it was."""
        self._unmerged = self._base_weight.detach().clone()
        self._base_weight.copy_(merged)
        return self._unmerged

    def _restore(self) -> None:
        assert self._unmerged is not None
        self._base_weight.copy_(self._unmerged)
        self._unmerged = None

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        parts = f", parts={'+'.join(self.parts)}" if self.parts else ""
        return f"r={self.r}, scaling={self.scaling:g}, variant={self.variant}{parts}" + ", merged" * self.is_merged


def _plus(base: Tensor, ax_R: Tensor, B: Tensor, scaling: float) -> Tensor:
    """base + s B A x (..., out), without the update as a tensor of its own."""
    if base.dtype != ax_R.dtype:
        return base + functional.linear(ax_R * scaling, B.to(ax_R.dtype))
    # Laid out anew, which costs nothing, because autograd takes the quicker of two products for the gradient of B then.
    b_RO = B.to(ax_R.dtype).T.contiguous()
    rows = torch.addmm(base.reshape(-1, len(B)), ax_R.reshape(-1, len(b_RO)), b_RO, alpha=scaling)
    return rows.view(base.shape)


class LoraLinear(LoraLayer):
    """Over an `nn.Linear`, weight (out, in)."""

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Any Linear, subclasses included: they compute the same."""
        return isinstance(module, nn.Linear)


class LoraConv1D(LoraLayer):
    """Over transformers' `Conv1D` (GPT-2): a Linear whose weight is (in, out)."""

    is_transposed = True

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """By name and structure, as transformers is not known here."""
        is_named_so = any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
        return is_named_so and module.get_parameter("weight").shape[1] == getattr(module, "nf", None)
