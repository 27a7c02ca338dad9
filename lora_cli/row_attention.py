"""Rows of different length laid end to end, and attention within each of them. Knows tensors only; not models.

Attention runs on groups of rows of like length, each padded to its longest, so that little of the padding comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_cli.dropout import dropout as drop
from lora_cli.dropout import of_block

if TYPE_CHECKING:
    import torch

__all__ = ["DECODING", "ENCODING", "Rows", "attend", "lay", "means"]

ENCODING, DECODING = "lora_unpadded", "lora_unpadded_causal"
"""Names of `attend` in transformers' registry, and so in the config of a model that lays its rows end to end."""

_GROUPS = 3
"""Groups of rows of like length; within one, attention pads to the longest."""
_SHORT = 64
"""Tokens up to which three plain operations are faster on a CPU than the fused one."""


@dataclass(frozen=True)
class Rows:
    """Where the rows of a batch lie in the one sequence of T tokens: by length within each block, or by owner."""

    lengths: torch.Tensor
    """Tokens of each row (N,), in the order of the batch."""
    starts: torch.Tensor
    """Position of each row's first token (N,), in the order of the batch."""
    groups: Sequence[_Group]
    has_owners: bool
    """Whether the rows of a group lie apart, as they are sorted by owner."""
    _places: dict[tuple[int, int], _Places] = field(default_factory=dict)

    def places(self, heads: int, shared: int) -> _Places:
        """See `_Places`; of so many heads, `shared` of which have one key and value."""
        if (heads, shared) not in self._places:
            self._places[heads, shared] = _places(self, heads, shared)
        return self._places[heads, shared]


@dataclass(frozen=True)
class _Places:
    """Where a head of a token lies in the sequence, and in all groups, padded, one after the other."""

    query: torch.Tensor
    """Places (T · heads,) of what a group holds, its rows' heads one after the other. Past its end a row's last token
    is repeated: what stands there is never another row's."""
    key: torch.Tensor
    """The same among the heads of keys and values."""
    back: torch.Tensor
    """Of each token's heads, in the sequence's order (T · heads,), the place in the groups."""


@dataclass(frozen=True)
class _Group:
    """`rows` rows of at most `width` tokens, which lie at start:stop unless rows have owners."""

    block: int
    start: int
    stop: int
    members: torch.Tensor
    """Their numbers in the batch (rows,), by length."""
    rows: int
    width: int
    places: torch.Tensor | None
    """Of each token in the padded (rows · width,); None: no row is shorter than another."""
    mask: torch.Tensor | None
    """True where a token is (rows, width)."""


def lay(
    lengths: torch.Tensor,
    device: torch.device,
    blocks: Sequence[int] | None = None,
    owners: torch.Tensor | None = None,
) -> tuple[Rows, torch.Tensor]:
    """Where rows of these lengths lie, told on `device`, and the order (N,) in which they do.

    `blocks` are numbers of neighbouring rows that lie as they would alone, one block after the other. Rows of one of
    the `owners` (N,) are neighbours: for a batch without gradients and without blocks.
    """
    import torch

    sizes = [len(lengths)] if blocks is None else list(blocks)
    firsts = [sum(sizes[:number]) for number in range(len(sizes))]
    parts = lengths.split_with_sizes(sizes)
    by_length = torch.cat([first + part.argsort(stable=True) for first, part in zip(firsts, parts, strict=True)])
    order = by_length if owners is None else owners.argsort(stable=True)
    ends = lengths[order].cumsum(0)
    starts = torch.empty_like(lengths)
    starts[order] = ends - lengths[order]
    groups, start = [], 0
    for block, part in enumerate(by_length.split_with_sizes(sizes)):
        for members in part.tensor_split(min(_GROUPS, len(part))):
            groups.append(_group(block, start, members, lengths[members], device))
            start = groups[-1].stop
    return Rows(lengths.to(device), starts.to(device), groups, owners is not None), order


def _group(block: int, start: int, members: torch.Tensor, lengths: torch.Tensor, device: torch.device) -> _Group:
    """The group of rows of these lengths, sorted, that begins at `start`."""
    import torch

    sizes = lengths.tolist()
    width = sizes[-1]
    mask = places = None
    if sizes[0] < width:
        mask = torch.arange(width) < lengths[:, None]
        places, mask = mask.flatten().nonzero()[:, 0].to(device), mask.to(device)
    return _Group(block, start, start + sum(sizes), members.to(device), len(sizes), width, places, mask)


def _places(rows: Rows, heads: int, shared: int) -> _Places:
    import torch

    device = rows.starts.device
    head = torch.arange(heads, device=device)
    query, key, first = [], [], 0
    back = torch.empty(int(rows.lengths.sum()), heads, dtype=torch.int64, device=device)
    for group in rows.groups:
        lengths, place = rows.lengths[group.members, None], torch.arange(group.width, device=device)
        token = rows.starts[group.members, None] + place.minimum(lengths - 1)
        query.append((token[:, None] * heads + head[:, None]).flatten())
        key.append((token[:, None] * (heads // shared) + head[:, None] // shared).flatten())
        padded = first + torch.arange(len(query[-1]), device=device).view(group.rows, heads, group.width)
        is_real = place < lengths
        back[token[is_real]] = padded.transpose(1, 2)[is_real]
        first += len(query[-1])
    return _Places(torch.cat(query), torch.cat(key), back.flatten())


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
    if rows.has_owners or not torch.is_grad_enabled():
        return _attend_at_once(query, key, value, rows, causal, scale, dropout, sliding_window), None
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


def _attend_at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Rows,
    causal: bool,
    scale: float,
    dropout: float,
    window: int | None,
) -> torch.Tensor:
    """`attend`, where going backward would be slow: the groups are taken in one step, and one leads back."""
    import torch

    heads = query.shape[1]
    places = rows.places(heads, heads // key.shape[1])
    q, k, v = (
        x[0].transpose(0, 1).reshape(-1, x.shape[-1]).index_select(0, where)
        for x, where in ((query, places.query), (key, places.key), (value, places.key))
    )
    parts, sizes = [], [group.rows * heads * group.width for group in rows.groups]
    for group, *own in zip(rows.groups, *(torch.split(x, sizes) for x in (q.mul_(scale), k, v)), strict=True):
        q_own, k_own, v_own = (x.view(group.rows, heads, group.width, -1) for x in own)
        mask = _visible(group, window, causal=causal, device=query.device)
        with of_block(group.block):
            parts.append(_softmax_attention(q_own, k_own, v_own, mask, 1.0, dropout).flatten(0, 2))
    return torch.cat(parts).index_select(0, places.back).view(1, -1, heads, v.shape[-1])


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
    scores = torch.matmul(query if scale == 1 else query * scale, key.transpose(2, 3))
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    weights = scores.softmax(-1)
    return torch.matmul(drop(weights, dropout) if dropout else weights, value)
