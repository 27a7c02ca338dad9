"""Rows of tokens as batches of matrices, and attention within them as one node of autograd. Knows tensors only.

Written out for autograd, most of a short row's attention would be copies: heads made contiguous, rows filled up, and
the same again for the gradients. Here one look-up a tensor does all of it, into a layout in which each group of rows is
a batch of matrices that needs no further copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_cli.dropout import mask, of_block

__all__ = ["Group", "Layout", "Places", "attention"]


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
    """How the rows of all groups are matrices of `heads` heads, `shared` of which have one key and value.

    `blocked` is, of each group, true where a query may not see a key (broadcasts to (rows, heads, width, width)), or
    None where each may see all of its row.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        blocked: Sequence[Tensor | None],
        heads: int,
        shared: int,
        device: torch.device,
    ) -> None:
        self.groups, self.heads, self._device = groups, heads, device
        self.width = max(group.width for group in groups)
        self.blocked = [None if each is None else each.to(device) for each in blocked]
        self.queries = Places(groups, heads, device)
        self.keys = self.queries.of_keys(shared)

    def of_firsts(self) -> Layout:
        """The same where a row's first token is its one query."""
        firsts = copy(self)
        firsts.blocked = [None if each is None else each[..., :1, :] for each in self.blocked]
        firsts.queries = Places(self.groups, self.heads, self._device, only_first=True)
        return firsts


class Places:
    """Where the heads of T tokens stand in the matrices of all groups, P rows in all, and the other way round. With
    `only_first` those of each row's first token stand there, and no others.
    """

    def __init__(self, groups: Sequence[Group], heads: int, device: torch.device, *, only_first: bool = False) -> None:
        self._heads, self._shared = heads, 1
        self._num_tokens = sum(int(group.lengths.sum()) for group in groups)
        width = 1 if only_first else None
        tokens = [group.tokens[:, None, :width] for group in groups]
        are_tokens = [group.are_tokens[:, None, :width].expand(-1, heads, -1).flatten() for group in groups]
        self._shapes = [(len(each) * heads, each.shape[2]) for each in tokens]
        self._sizes = [rows * width for rows, width in self._shapes]
        sources = torch.cat([(each * heads + torch.arange(heads)[:, None]).flatten() for each in tokens])
        is_token = torch.cat(are_tokens)
        self._sources = sources.to(device)
        self._places: Tensor | None = None
        """Of each head of a token its row; None: not all stand somewhere, and those that do as `_sources` says."""
        if not only_first:
            places = torch.empty(int(is_token.sum()), dtype=torch.int64)
            places[sources[is_token]] = is_token.nonzero()[:, 0]
            self._places = places.to(device)
        self._padding = (~is_token).nonzero()[:, 0].to(device)

    def of_keys(self, shared: int) -> Places:
        """The same for keys and values, each of which so many heads share."""
        if shared == 1:
            return self
        keys = copy(self)
        keys._shared, keys._sources = shared, self._sources // shared
        return keys

    def lay(self, x: Tensor) -> Tensor:
        """(T, heads, d), or of the heads of keys, → (P, d)."""
        laid: Tensor = _Lay.apply(x, self)  # type: ignore[no-untyped-call]
        return laid

    def back(self, laid: Tensor) -> Tensor:
        """(P, d) → (T, heads, d): zeros for a token that stands nowhere."""
        x: Tensor = _Back.apply(laid, self)  # type: ignore[no-untyped-call]
        return x

    def matrices(self, laid: Tensor) -> list[Tensor]:
        """(P, d) → of each group the matrices (rows · heads, width, d): views."""
        parts = zip(self._shapes, laid.split_with_sizes(self._sizes), strict=True)
        return [part.view(*shape, laid.shape[-1]) for shape, part in parts]

    def looked_up(self, x: Tensor) -> Tensor:
        """`lay`, without gradients."""
        return x.reshape(-1, x.shape[-1]).index_select(0, self._sources)

    def taken_back(self, laid: Tensor) -> Tensor:
        """`back`, without gradients."""
        if self._places is None:
            whole = laid.new_zeros(self._num_tokens * self._heads, laid.shape[-1])
            return whole.index_copy_(0, self._sources, laid).view(-1, self._heads, laid.shape[-1])
        return laid.index_select(0, self._places).view(-1, self._heads, laid.shape[-1])

    def summed(self, x: Tensor) -> Tensor:
        """(T, heads of queries, d) → (T, those of keys, d)."""
        return x if self._shared == 1 else x.view(len(x), -1, self._shared, x.shape[-1]).sum(2)

    def without_padding(self, laid: Tensor) -> Tensor:
        """`laid` with zeros where no token stands: in place."""
        return laid.index_fill_(0, self._padding, 0)


class _Lay(torch.autograd.Function):
    """What is repeated is seen by nobody, so that it has no gradient: backward is a look-up too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return places.looked_up(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.places.summed(ctx.places.taken_back(grads[0])), None


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, laid: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return places.taken_back(laid)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.places.without_padding(ctx.places.looked_up(grads[0])), None


def attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, dropout: float) -> Tensor:
    """softmax(scale · q kᵀ) v of each row and head, the weights dropped out: (P, d) each, the result as the query."""
    attended: Tensor = _Attention.apply(query, key, value, layout, scale, dropout)  # type: ignore[no-untyped-call]
    return attended


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, dropout: float
    ) -> Tensor:
        query, out = query * scale, torch.empty_like(query)
        kept: list[Tensor | None] = []
        q_o, k_v = map(layout.queries.matrices, (query, out)), map(layout.keys.matrices, (key, value))
        parts = zip(layout.groups, layout.blocked, *q_o, *k_v, strict=True)
        with torch.autocast(query.device.type, enabled=False):
            for group, blocked, q, o, k, v in parts:
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
        of_queries = map(ctx.layout.queries.matrices, (query, grads[0], d_query))
        of_keys = map(ctx.layout.keys.matrices, (key, value, d_key, d_value))
        for q, d_o, d_q, k, v, d_k, d_v, weights, factors in zip(
            *of_queries, *of_keys, kept[::2], kept[1::2], strict=True
        ):
            torch.bmm(_dropped(weights, factors).transpose(1, 2), d_o, out=d_v)
            d_weights = _dropped(torch.bmm(d_o, v.transpose(1, 2)), factors)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            torch.bmm(d_scores, k, out=d_q)
            if ctx.needs_input_grad[1]:
                torch.bmm(d_scores.transpose(1, 2), q, out=d_k)
        return d_query.mul_(ctx.scale), d_key if ctx.needs_input_grad[1] else None, d_value, None, None, None


def _dropped(weights: Tensor, factors: Tensor | None) -> Tensor:
    return weights if factors is None else weights * factors
