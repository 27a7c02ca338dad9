"""Rows of tokens as batches of matrices, and attention within them as one node of autograd. Knows tensors only.

Written out for autograd, most of a short row's attention would be copies: heads made contiguous, rows filled up, and
the same again for the gradients. Here one look-up a tensor does all of it, into a layout in which each group of rows is
a batch of matrices that needs no further copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_cli.dropout import mask, of_block

__all__ = ["Group", "Layout", "attention"]


@dataclass(frozen=True)
class Group:
    """Rows of like length, filled up to `width` tokens. All of it is on the CPU."""

    block: int
    """Whose rows these are, where several trainings share a batch: see `dropout.of_block`."""
    starts: Tensor
    """Position of each row's first token (rows,)."""
    lengths: Tensor
    """Tokens of each row (rows,), ascending."""

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths[-1])

    @property
    def are_tokens(self) -> Tensor:
        """True where a row has a token (rows, width)."""
        return torch.arange(self.width) < self.lengths[:, None]

    @property
    def tokens(self) -> Tensor:
        """Positions of the tokens (rows, width). Past its end a row's last one is repeated: what stands there is never
        another row's, and seen by nobody.
        """
        return self.starts[:, None] + torch.arange(self.width).minimum(self.lengths[:, None] - 1)


class Layout:
    """Where the heads of T tokens stand in the matrices of all groups, P rows in all, and the other way round.

    `shared` of the `heads` have one key and value. `blocked` is, of each group, true where a query may not see a key
    (broadcasts to (rows, heads, width, width)), or None where each may see all of its row.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        blocked: Sequence[Tensor | None],
        heads: int,
        shared: int,
        device: torch.device,
    ) -> None:
        self.groups, self.heads, self._shared = groups, heads, shared
        self.width = max(group.width for group in groups)
        self.blocked = [None if each is None else each.to(device) for each in blocked]
        head = torch.arange(heads)[:, None]
        tokens = [group.tokens[:, None] for group in groups]
        are_tokens = [group.are_tokens[:, None].expand(-1, heads, -1).flatten() for group in groups]
        self._shapes = [(len(each) * heads, each.shape[2]) for each in tokens]
        self._sizes = [rows * width for rows, width in self._shapes]
        sources = torch.cat([(each * heads + head).flatten() for each in tokens])
        keys = torch.cat([(each * (heads // shared) + head // shared).flatten() for each in tokens])
        is_token = torch.cat(are_tokens)
        places = torch.empty(int(is_token.sum()), dtype=torch.int64)
        places[sources[is_token]] = is_token.nonzero()[:, 0]
        self._sources, self._keys, self.places = sources.to(device), keys.to(device), places.to(device)
        self._padding = (~is_token).nonzero()[:, 0].to(device)

    def lay(self, x: Tensor) -> Tensor:
        """(T, heads, d), or of the heads of keys, → (P, d)."""
        laid: Tensor = _Lay.apply(x, self)  # type: ignore[no-untyped-call]
        return laid

    def back(self, laid: Tensor) -> Tensor:
        """(P, d) → (T, heads, d)."""
        x: Tensor = _Back.apply(laid, self)  # type: ignore[no-untyped-call]
        return x

    def matrices(self, laid: Tensor) -> list[Tensor]:
        """(P, d) → of each group the matrices (rows · heads, width, d): views."""
        parts = zip(self._shapes, laid.split_with_sizes(self._sizes), strict=True)
        return [part.view(*shape, laid.shape[-1]) for shape, part in parts]

    def looked_up(self, x: Tensor) -> Tensor:
        """`lay`, without gradients."""
        sources = self._sources if x.shape[1] == self.heads else self._keys
        return x.reshape(-1, x.shape[-1]).index_select(0, sources)

    def taken_back(self, laid: Tensor) -> Tensor:
        """`back`, without gradients."""
        return laid.index_select(0, self.places).view(-1, self.heads, laid.shape[-1])

    def summed(self, x: Tensor, heads: int) -> Tensor:
        """(T, heads of queries, d) → (T, `heads`, d)."""
        return x if heads == self.heads else x.view(-1, heads, self._shared, x.shape[-1]).sum(2)

    def without_padding(self, laid: Tensor) -> Tensor:
        """`laid` with zeros where no token stands: in place."""
        return laid.index_fill_(0, self._padding, 0)


class _Lay(torch.autograd.Function):
    """What is repeated is seen by nobody, so that it has no gradient: backward is a look-up too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout, ctx.heads = layout, x.shape[1]
        return layout.looked_up(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.layout.summed(ctx.layout.taken_back(grads[0]), ctx.heads), None


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, laid: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return layout.taken_back(laid)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.layout.without_padding(ctx.layout.looked_up(grads[0])), None


def attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, dropout: float) -> Tensor:
    """softmax(scale · q kᵀ) v of each row and head, the weights dropped out: (P, d) each, and so is the result."""
    attended: Tensor = _Attention.apply(query, key, value, layout, scale, dropout)  # type: ignore[no-untyped-call]
    return attended


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, dropout: float
    ) -> Tensor:
        query, out = query * scale, torch.empty_like(value)
        kept: list[Tensor | None] = []
        parts = zip(layout.groups, layout.blocked, *map(layout.matrices, (query, key, value, out)), strict=True)
        with torch.autocast(query.device.type, enabled=False):
            for group, blocked, q, k, v, o in parts:
                scores = torch.bmm(q, k.transpose(1, 2))
                if blocked is not None:
                    scores.view(-1, layout.heads, *scores.shape[1:]).masked_fill_(blocked, -torch.inf)
                weights = scores.softmax(-1)
                with of_block(group.block):
                    factors = mask(weights, dropout) if dropout else None
                torch.bmm(_dropped(weights, factors), v, out=o)
                kept += [weights, factors]
        ctx.save_for_backward(query, key, value, *kept)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, *kept = ctx.saved_tensors
        d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))
        whole = (query, key, value, grads[0], d_query, d_key, d_value)
        parts = zip(*map(ctx.layout.matrices, whole), kept[::2], kept[1::2], strict=True)
        for q, k, v, d_o, d_q, d_k, d_v, weights, factors in parts:
            torch.bmm(_dropped(weights, factors).transpose(1, 2), d_o, out=d_v)
            d_weights = _dropped(torch.bmm(d_o, v.transpose(1, 2)), factors)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            torch.bmm(d_scores, k, out=d_q)
            if ctx.needs_input_grad[1]:
                torch.bmm(d_scores.transpose(1, 2), q, out=d_k)
        return d_query.mul_(ctx.scale), d_key if ctx.needs_input_grad[1] else None, d_value, None, None, None


def _dropped(weights: Tensor, factors: Tensor | None) -> Tensor:
    return weights if factors is None else weights * factors
