"""Rows of different length laid end to end, and attention within each of them. Knows tensors only; not models.

Attention runs on groups of rows of like length, each padded to its longest, so that little of the padding comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lora_cli.dropout import of_block

if TYPE_CHECKING:
    import torch

    from lora_cli.plain_attention import Group, Layout

__all__ = ["DECODING", "ENCODING", "Rows", "attend", "lay", "means"]

ENCODING, DECODING = "lora_unpadded", "lora_unpadded_causal"
"""Names of `attend` in transformers' registry, and so in the config of a model that lays its rows end to end."""
_SHORT = 256
"""Tokens up to which plain operations are faster on a CPU than the fused one."""
_PER_GROUP = {"cpu": 700}
"""Weights of attention of one head that take as long as one group more; a GPU would rather have fewer groups."""


@dataclass(frozen=True)
class Rows:
    """Where the rows of a batch lie in the one sequence of T tokens: by length within each block, or by owner."""

    lengths: torch.Tensor
    """Tokens of each row (N,), in the order of the batch."""
    starts: torch.Tensor
    """Position of each row's first token (N,), in the order of the batch."""
    num_tokens: int
    """T: the tokens of all rows, and what a block is filled up with at its end."""
    groups: Sequence[Group]
    kept: torch.Tensor | None = None
    """Positions of the tokens that are read past the last layer; None: all are."""
    only_first: bool = False
    """Whether in attention a row's first token alone asks."""
    _layouts: dict[tuple[object, ...], Layout] = field(default_factory=dict, repr=False, compare=False)

    def owners(self) -> torch.Tensor:
        """The number of each token's row (T,); of what is filled in, that of the row before."""
        import torch

        order = self.starts.argsort()
        starts = self.starts[order]
        return order.repeat_interleave(torch.diff(starts, append=starts.new_tensor([self.num_tokens])))

    def layout(self, heads: int, shared: int, window: int | None, *, causal: bool) -> Layout:
        """The groups as matrices of so many heads, `shared` of which have one key and value: for all layers alike."""
        from lora_cli.plain_attention import Layout

        key = heads, shared, window, causal, self.only_first
        if key in self._layouts:
            return self._layouts[key]
        if self.only_first:
            layout = replace(self, only_first=False).layout(heads, shared, window, causal=causal).of_firsts()
        else:
            blocked = [_blocked(group, window, causal=causal) for group in self.groups]
            layout = Layout(self.groups, blocked, heads, shared, self.starts.device)
        self._layouts[key] = layout
        return layout


def lay(
    lengths: torch.Tensor,
    device: torch.device,
    blocks: Sequence[int] | None = None,
    owners: torch.Tensor | None = None,
    *,
    fills: bool = False,
) -> tuple[Rows, torch.Tensor]:
    """Where rows of these lengths lie, told on `device`, and the order (N,) in which they do.

    `blocks` are numbers of neighbouring rows that lie as they would alone, one block after the other. Rows of one of
    the `owners` (N,) are neighbours: for a batch without blocks. If it `fills`, each block ends with rows that nobody
    asked for, of as many tokens as are missing to a number that `products` are quick with.
    """
    import torch

    from lora_cli.plain_attention import Group

    sizes = [len(lengths)] if blocks is None else list(blocks)
    parts = torch.arange(len(lengths)).split_with_sizes(sizes)
    by_length = [part[lengths[part].argsort(stable=True)] for part in parts]
    order = torch.cat(by_length) if owners is None else owners.argsort(stable=True)
    added = [_fillers(lengths[part]) if fills else [] for part in parts]
    extended = torch.cat([lengths, lengths.new_tensor([each for block in added for each in block])])
    fillers = torch.arange(len(lengths), len(extended)).split_with_sizes(list(map(len, added)))
    sequence = torch.cat([each for pair in zip(order.split_with_sizes(sizes), fillers, strict=True) for each in pair])
    starts = torch.empty_like(extended)
    starts[sequence] = extended[sequence].cumsum(0) - extended[sequence]
    per_group = _PER_GROUP.get(device.type, 50 * _PER_GROUP["cpu"])
    groups = []
    for block, pair in enumerate(zip(by_length, fillers, strict=True)):
        rows = torch.cat(pair)
        rows = rows[extended[rows].argsort(stable=True)]
        for members in rows.split_with_sizes(_group_sizes(extended[rows].tolist(), per_group)):
            groups.append(Group(block, starts[members], extended[members]))
    num_tokens = int(extended.sum())
    return Rows(lengths.to(device), starts[: len(lengths)].to(device), num_tokens, groups), order


def _fillers(lengths: torch.Tensor) -> list[int]:
    """Lengths of rows that fill up a block of rows with these, none longer than the longest."""
    from lora_cli.products import filled

    num_tokens, longest = int(lengths.sum()), int(lengths.max())
    whole, rest = divmod(filled(num_tokens) - num_tokens, longest)
    return [longest] * whole + [rest] * bool(rest)


def _group_sizes(lengths: Sequence[int], per_group: int) -> list[int]:
    """How many neighbours of these rows, sorted by length, make each group: one costs `per_group`, and what its rows do
    when they are padded to the longest; all groups together as little as can be.
    """
    import numpy as np

    # least[n] is what the first n rows cost at the least, and first[n] where the last group of them begins.
    least, first = np.zeros(len(lengths) + 1), [0] * (len(lengths) + 1)
    numbers = np.arange(len(lengths))
    for stop, width in enumerate(lengths, 1):
        costs = least[:stop] + (stop - numbers[:stop]) * width**2 + per_group
        first[stop] = int(costs.argmin())
        least[stop] = costs[first[stop]]
    sizes, stop = [], len(lengths)
    while stop:
        sizes.append(stop - first[stop])
        stop = first[stop]
    return sizes[::-1]


def means(hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
    """(T, d) → the mean of each row (N, d)."""
    import torch

    owners = rows.owners()
    is_filled_in = torch.arange(rows.num_tokens, device=owners.device) >= (rows.starts + rows.lengths)[owners]
    owners = owners.masked_fill(is_filled_in, len(rows.starts))
    sums = hidden.new_zeros(len(rows.starts) + 1, hidden.shape[1]).index_add(0, owners, hidden)
    return sums[:-1] / rows.lengths[:, None]


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
    """Attention within each row: (1, heads, T, d) each → (1, T, heads, d). Keys and values may have fewer heads. Where
    first tokens alone ask, zeros for all others.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from lora_cli.plain_attention import attention

    if rows is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    if torch.is_autocast_enabled(query.device.type):
        # As torch's own does: positions may have been turned into wider numbers, which would meet others here.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layout = rows.layout(query.shape[1], query.shape[1] // key.shape[1], sliding_window, causal=causal)
    q, k, v = (
        places.lay(x.squeeze(0).transpose(0, 1))
        for x, places in ((query, layout.queries), (key, layout.keys), (value, layout.keys))
    )
    attended = attention if query.device.type == "cpu" and layout.width <= _SHORT else _fused_attention
    return layout.queries.back(attended(q, k, v, layout, scale, dropout))[None], None


def _fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float, dropout: float
) -> torch.Tensor:
    """`plain_attention.attention` by torch's kernels."""
    import torch
    from torch.nn import functional

    parts, k_v = [], map(layout.keys.matrices, (key, value))
    for group, blocked, *own in zip(layout.groups, layout.blocked, layout.queries.matrices(query), *k_v, strict=True):
        q, k, v = (x.unflatten(0, (-1, layout.heads)) for x in own)
        mask = None if blocked is None else ~blocked
        with of_block(group.block):
            out = functional.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=scale)
        parts.append(out.flatten(0, 2))
    return torch.cat(parts)


def _blocked(group: Group, window: int | None, *, causal: bool) -> torch.Tensor | None:
    """True where a query may not see a key: broadcasts to (rows, 1, width, width); None: each sees all of its row."""
    import torch

    width, past = group.width, None
    if int(group.lengths[0]) < width:
        past = ~group.are_tokens[:, None, None]
    if not causal and (window is None or width <= window):
        return past
    places = torch.arange(width)
    distance = places[:, None] - places
    far = distance.abs() >= (window or width)
    if causal:
        # Padding comes last, where no token looks.
        return far | (distance < 0)
    # A token of the padding sees itself: who sees nothing has no softmax.
    return far if past is None else (far | past) & (distance != 0)
