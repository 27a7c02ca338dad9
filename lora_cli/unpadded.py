"""Encoders without padding: the rows of a batch run end to end through all that is done token by token.

Knows transformers' attention registry and the places where heads read; nothing of tasks, adapters or training. From the
outside a model is what it was: padded rows in, logits a row out. Inside, a batch is one sequence of its real tokens;
attention sees the rows, in groups of like length; and past the last attention only the tokens that the head reads
are computed. No module is rewritten: what happens is in four hooks, and in the function that attends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["remove_padding"]

_ATTENTION = "lora_unpadded"
"""Name of the attention function in transformers' registry."""
_GROUPS = 3
"""Groups of rows of like length; within one, attention pads to the longest."""
_SHORT = 64
"""Tokens up to which three plain operations are faster on a CPU than the fused one."""


@dataclass(frozen=True)
class _Anatomy:
    """Where the modules of a family are. `encoder` gives the hidden states (N, T, d) that a pooler or head reads the
    first token of; into `narrow`, of the last layer, go attention's output and what is added to it.
    """

    encoder: str
    narrow: str | None = None


_BERT = _Anatomy("encoder", "encoder.layer.{last}.attention.output")
_FAMILIES = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "distilbert": _Anatomy("transformer", "transformer.layer.{last}.sa_layer_norm"),
    # One layer is all layers, so that none is the last.
    "albert": _Anatomy("encoder"),
    # What is added to attention's output is added outside of any module.
    "modernbert": _Anatomy(""),
}
"""model_type → anatomy. DeBERTa's attention is its own; decoders have `train.packing`."""


@dataclass(frozen=True)
class _Rows:
    """Where the rows of a batch lie in the one sequence of T tokens, sorted by length."""

    lengths: torch.Tensor
    """Tokens of each row (N,), in the order of the batch."""
    starts: torch.Tensor
    """Position of each row's first token (N,), in the order of the batch."""
    groups: Sequence[_Group]


@dataclass(frozen=True)
class _Group:
    """`rows` neighbouring rows of at most `width` tokens, which lie at start:stop."""

    start: int
    stop: int
    rows: int
    width: int
    places: torch.Tensor | None
    """Of each token in the padded (rows · width,); None: no row is shorter than another."""
    mask: torch.Tensor | None
    """True where a token is (rows, width)."""


def remove_padding(model: PreTrainedModel) -> bool:
    """Make `model`, an encoder with a head, skip the padding of what it is given; False: not with its family.

    A batch that is padded on the right, with `input_ids` and `attention_mask` by name, then takes the time of its real
    tokens. Any other call is computed as before. Logits agree with those of the padded batch up to rounding;
    with dropout other elements are dropped.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    anatomy = _FAMILIES.get(model.config.model_type)
    if anatomy is None or model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(_ATTENTION, _attend)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    model.config._attn_implementation = _ATTENTION
    hooks = _Hooks(model, anatomy)
    model.register_forward_pre_hook(hooks.lay_end_to_end, with_kwargs=True)
    encoder = model.base_model.get_submodule(anatomy.encoder)
    if anatomy.narrow is not None:
        name = anatomy.narrow.format(last=model.config.num_hidden_layers - 1)
        model.base_model.get_submodule(name).register_forward_pre_hook(hooks.narrow)
    encoder.register_forward_hook(hooks.pick)
    return True


class _Hooks:
    """What is done to a batch on its way."""

    def __init__(self, model: PreTrainedModel, anatomy: _Anatomy) -> None:
        self._is_narrowed = anatomy.narrow is not None
        self._means = getattr(model.config, "classifier_pooling", "cls") == "mean"
        self._offset = _first_position(model)
        self._rows: _Rows | None = None

    def lay_end_to_end(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Padded rows (N, longest) → one row (1, T)."""
        self._rows, mask = None, kwargs.get("attention_mask")
        if args or mask is None or mask.ndim != 2 or kwargs.get("input_ids") is None:
            return None
        # All of it is decided on the CPU, so that a GPU is waited for once.
        mask = mask.cpu().bool()
        if not _is_padded_right(mask):
            return None
        device = kwargs["input_ids"].device
        self._rows, order = _lay(mask.sum(1), device)
        positions = (mask.cumsum(1) - 1 + self._offset)[order][mask[order]]
        replaced: dict[str, Any] = {"position_ids": positions[None].to(device), "rows": self._rows}
        for name in {"input_ids", "token_type_ids"} & kwargs.keys():
            replaced[name] = kwargs[name][order][mask[order]][None]
        replaced["attention_mask"] = None
        return args, {**kwargs, **replaced}

    def narrow(self, module: Any, args: tuple[Any, ...]) -> Any:
        """(1, T, d) each → (1, N, d): the first tokens."""
        return None if self._rows is None else tuple(x[:, self._rows.starts] for x in args)

    def pick(self, module: Any, args: Any, output: Any) -> Any:
        """Hidden states (1, T, d) → (N, 1, d): what the head reads."""
        if self._rows is None:
            return None
        hidden = output.last_hidden_state
        if self._means:
            hidden = _means(hidden[0], self._rows)
        else:
            hidden = hidden[0] if self._is_narrowed else hidden[0, self._rows.starts]
        output.last_hidden_state = hidden[:, None]
        return output


def _first_position(model: PreTrainedModel) -> int:
    """Number of a row's first position: RoBERTa counts from behind the pad token's."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


def _is_padded_right(mask: torch.Tensor) -> bool:
    return mask.ndim == 2 and bool(mask[:, 0].all()) and bool((mask[:, 1:] <= mask[:, :-1]).all())


def _lay(lengths: torch.Tensor, device: torch.device) -> tuple[_Rows, torch.Tensor]:
    """Where rows of these lengths lie, told on `device`, and the order (N,) in which they do."""
    import torch

    order = lengths.argsort(stable=True)
    ends = lengths[order].cumsum(0)
    starts = torch.empty_like(lengths)
    starts[order] = ends - lengths[order]
    groups, start = [], 0
    for part in lengths[order].tensor_split(min(_GROUPS, len(lengths))):
        sizes = part.tolist()
        width, stop = sizes[-1], start + sum(sizes)
        mask = places = None
        if sizes[0] < width:
            mask = torch.arange(width) < part[:, None]
            places, mask = mask.flatten().nonzero()[:, 0].to(device), mask.to(device)
        groups.append(_Group(start, stop, len(sizes), width, places, mask))
        start = stop
    return _Rows(lengths.to(device), starts.to(device), groups), order


def _means(hidden: torch.Tensor, rows: _Rows) -> torch.Tensor:
    """(T, d) → the mean of each row (N, d)."""
    import torch

    order = rows.starts.argsort()
    owner = torch.repeat_interleave(order, rows.lengths[order])
    sums = hidden.new_zeros(len(order), hidden.shape[1]).index_add(0, owner, hidden)
    return sums / rows.lengths[:, None]


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    rows: _Rows | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each row: (1, heads, T, d) each → (1, T, heads, d)."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if rows is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scale)
        return out, None
    parts = []
    for group in rows.groups:
        mask = _visible(group, sliding_window, query.device)
        q, k, v = (_padded(x[0, :, group.start : group.stop].transpose(0, 1), group) for x in (query, key, value))
        out = _softmax_attention(q, k, v, mask, scale, dropout)
        flat = out.transpose(1, 2).flatten(0, 1)
        parts.append(flat if group.places is None else flat.index_select(0, group.places))
    return torch.cat(parts)[None], None


def _visible(group: _Group, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which key a query may see: broadcasts to (rows, 1, width, width); None: each in its row."""
    import torch

    mask = None if group.mask is None else group.mask[:, None, None]
    if window is None or group.width <= window:
        return mask
    places = torch.arange(group.width, device=device)
    distance = (places[:, None] - places).abs()
    # A token of the padding sees itself: who sees nothing has no softmax.
    return distance < window if mask is None else (distance < window) & mask | (distance == 0)


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
    return torch.matmul(functional.dropout(scores.softmax(-1), dropout), value)
