"""Rows of different length laid end to end, and attention within each of them. Knows tensors only; not models.

Attention runs on groups of rows of like length, each padded to its longest, so that little of the padding comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_cli.dropout import dropout as drop
from lora_cli.dropout import of_block

if TYPE_CHECKING:
    import torch

__all__ = ["Rows", "attend", "lay", "means"]

_GROUPS = 3
"""Groups of rows of like length; within one, attention pads to the longest."""
_SHORT = 64
"""Tokens up to which three plain operations are faster on a CPU than the fused one."""


@dataclass(frozen=True)
class Rows:
    """Where the rows of a batch lie in the one sequence of T tokens, sorted by length within each block."""

    lengths: torch.Tensor
    """Tokens of each row (N,), in the order of the batch."""
    starts: torch.Tensor
    """Position of each row's first token (N,), in the order of the batch."""
    groups: Sequence[_Group]


@dataclass(frozen=True)
class _Group:
    """`rows` neighbouring rows of at most `width` tokens, which lie at start:stop."""

    block: int
    start: int
    stop: int
    rows: int
    width: int
    places: torch.Tensor | None
    """Of each token in the padded (rows · width,); None: no row is shorter than another."""
    mask: torch.Tensor | None
    """True where a token is (rows, width)."""


def lay(lengths: torch.Tensor, device: torch.device, blocks: Sequence[int] | None = None) -> tuple[Rows, torch.Tensor]:
    """Where rows of these lengths lie, told on `device`, and the order (N,) in which they do.

    `blocks` are numbers of neighbouring rows that lie as they would alone, one block after the other.
    """
    import torch

    sizes = [len(lengths)] if blocks is None else list(blocks)
    firsts = [sum(sizes[:number]) for number in range(len(sizes))]
    parts = lengths.split_with_sizes(sizes)
    order = torch.cat([first + part.argsort(stable=True) for first, part in zip(firsts, parts, strict=True)])
    ends = lengths[order].cumsum(0)
    starts = torch.empty_like(lengths)
    starts[order] = ends - lengths[order]
    groups, start = [], 0
    for block, part in enumerate(lengths[order].split_with_sizes(sizes)):
        for group in part.tensor_split(min(_GROUPS, len(part))):
            groups.append(_group(block, start, group, device))
            start = groups[-1].stop
    return Rows(lengths.to(device), starts.to(device), groups), order


def _group(block: int, start: int, lengths: torch.Tensor, device: torch.device) -> _Group:
    """The group of rows of these lengths, sorted, that begins at `start`."""
    import torch

    sizes = lengths.tolist()
    width = sizes[-1]
    mask = places = None
    if sizes[0] < width:
        mask = torch.arange(width) < lengths[:, None]
        places, mask = mask.flatten().nonzero()[:, 0].to(device), mask.to(device)
    return _Group(block, start, start + sum(sizes), len(sizes), width, places, mask)


def means(hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
    """(T, d) → the mean of each row (N, d)."""
    import torch

    order = rows.starts.argsort()
    owner = torch.repeat_interleave(order, rows.lengths[order])
    sums = hidden.new_zeros(len(order), hidden.shape[1]).index_add(0, owner, hidden)
    return sums / rows.lengths[:, None]


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    causal: bool,
    scaling: float | None = None,
    dropout: float = 0.0,
    rows: Rows | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each row: (1, heads, T, d) each → (1, T, heads, d). Keys and values may have fewer heads."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if rows is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    parts = []
    for group in rows.groups:
        mask = _visible(group, sliding_window, causal=causal, device=query.device)
        q, k, v = (_padded(x[0, :, group.start : group.stop].transpose(0, 1), group) for x in (query, key, value))
        with of_block(group.block):
            out = _softmax_attention(q, k, v, mask, scale, dropout)
        flat = out.transpose(1, 2).flatten(0, 1)
        parts.append(flat if group.places is None else flat.index_select(0, group.places))
    return torch.cat(parts)[None], None


def _visible(group: _Group, window: int | None, *, causal: bool, device: torch.device) -> torch.Tensor | None:
    """Which key a query may see: broadcasts to (rows, 1, width, width); None: each in its row."""
    import torch

    mask = None if group.mask is None else group.mask[:, None, None]
    if not causal and (window is None or group.width <= window):
        return mask
    places = torch.arange(group.width, device=device)
    distance = places[:, None] - places
    near = distance.abs() < (window or group.width)
    if causal:
        # Padding comes last, where no token looks.
        return near & (distance >= 0)
    # A token of the padding sees itself: who sees nothing has no softmax.
    return near if mask is None else near & mask | (distance == 0)


def _padded(x: torch.Tensor, group: _Group) -> torch.Tensor:
    """The tokens of a group (tokens, heads, d) → (rows, heads, width, d)."""
    if group.places is not None:
        x = x.new_zeros(group.rows * group.width, *x.shape[1:]).index_copy(0, group.places, x)
    return x.reshape(group.rows, group.width, *x.shape[1:]).transpose(1, 2)


def _softmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    import torch
    from torch.nn import functional

    if query.device.type != "cpu" or query.shape[2] > _SHORT:
        return functional.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout, scale=scale)
    scores = torch.matmul(query * scale, key.transpose(2, 3))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)
    return torch.matmul(drop(weights, dropout) if dropout else weights, value)
