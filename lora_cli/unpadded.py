"""Models without padding: the rows of a batch run end to end through all that is done token by token.

Knows transformers' attention registry and the places where heads read; nothing of tasks, adapters or training. From the
outside a model takes padded rows as before. Inside, a batch is one sequence of its real tokens; attention sees
the rows (`row_attention`); and what nobody reads is not computed: past the last attention all but the first token of
each row in an encoder, and all but the tokens that predict a label in a decoder. No module is rewritten: all of it is
in a few hooks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_cli.row_attention import DECODING, ENCODING, Rows, attend, lay, means

if TYPE_CHECKING:
    import torch
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

__all__ = ["can_remove_padding", "first_position", "num_laid", "remove_padding", "removes_padding", "takes_labels"]


@dataclass(frozen=True)
class _Last:
    """The last of some layers that add attention to what goes into them, and where in it attention begins and ends."""

    layer: str
    norm: str
    projection: str


@dataclass(frozen=True)
class _Narrow:
    """An attention, its query, and what attention's output and what is added to it go into: all of the last layer."""

    attention: str
    query: str
    output: str


@dataclass(frozen=True)
class _Anatomy:
    """Where the modules of a family are. `encoder` gives the hidden states (N, T, d) that a pooler or head reads the
    first token of.
    """

    encoder: str
    last: _Last | _Narrow | None = None


_BERT = _Anatomy(
    "encoder",
    _Narrow("encoder.layer.{last}.attention.self", "query", "encoder.layer.{last}.attention.output"),
)
_ENCODERS = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "distilbert": _Anatomy(
        "transformer",
        _Narrow("transformer.layer.{last}.attention", "q_lin", "transformer.layer.{last}.sa_layer_norm"),
    ),
    # One layer is all layers, so that none is the last.
    "albert": _Anatomy("encoder"),
    "modernbert": _Anatomy("", _Last("layers.{last}", "attn_norm", "attn.Wo")),
}
"""model_type → anatomy. DeBERTa's attention is its own."""
_LLAMA = _Last("layers.{last}", "input_layernorm", "self_attn.o_proj")
_DECODERS: dict[str, _Last | None] = {
    **dict.fromkeys(("gemma", "gemma3_text", "llama", "mistral", "mixtral"), _LLAMA),
    **dict.fromkeys(("phi3", "qwen2", "qwen3", "qwen3_moe"), _LLAMA),
    "gpt2": _Last("h.{last}", "ln_1", "attn.c_proj"),
    "gpt_neox": _Last("layers.{last}", "input_layernorm", "attention.dense"),
    "opt": _Last("decoder.layers.{last}", "self_attn_layer_norm", "self_attn.out_proj"),
    # One norm is before attention and the feed-forward layers, which take all of its tokens.
    "phi": None,
}
"""model_type → its last layer."""


def remove_padding(model: PreTrainedModel) -> bool:
    """Make `model` skip the padding of what it is given; False: not with its family.

    A batch that is padded on the right, with `input_ids` and `attention_mask` by name, then takes the time of its real
    tokens. A decoder does so where it is given `labels` as well, and returns the logits that predict those (targets,
    vocabulary), row by row; see `takes_labels`. Of `blocks`, numbers of neighbouring rows, each is laid out as it would
    be alone; rows of one of the `owners`, of which (N,) names each row's, are neighbours. Any other call is computed as
    before. Logits agree with those of the padded batch up to rounding; with dropout other elements are dropped.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    family, decodes = model.config.model_type, model.get_output_embeddings() is not None
    if model.config._attn_implementation != "sdpa" or not can_remove_padding(family, writes=decodes):
        return False
    name = DECODING if decodes else ENCODING
    AttentionInterface.register(name, partial(attend, causal=decodes))
    AttentionMaskInterface.register(name, sdpa_mask)
    model.config._attn_implementation = name
    last = _DECODERS[family] if decodes else _ENCODERS[family].last
    if isinstance(last, _Last) and getattr(model.config, "do_layer_norm_before", True):
        layer = model.base_model.get_submodule(_numbered(last.layer, model))
        narrowing = _LastLayer(last)
        layer.register_forward_pre_hook(narrowing.begin, with_kwargs=True)
        layer.register_forward_hook(narrowing.end)
    if decodes:
        decoder = _Decoder()
        model.register_forward_pre_hook(decoder.lay_end_to_end, with_kwargs=True)
        model.register_forward_hook(decoder.unwrap)
        return True
    encoder = _Encoder(model, is_narrowed=isinstance(last, _Narrow))
    model.register_forward_pre_hook(encoder.lay_end_to_end, with_kwargs=True)
    if isinstance(last, _Narrow):
        attention, asking = model.base_model.get_submodule(_numbered(last.attention, model)), _FirstsAsk(last.query)
        attention.register_forward_pre_hook(asking.begin, with_kwargs=True)
        attention.register_forward_hook(asking.end)
        output = model.base_model.get_submodule(_numbered(last.output, model))
        output.register_forward_pre_hook(encoder.narrow)
    model.base_model.get_submodule(_ENCODERS[family].encoder).register_forward_hook(encoder.pick)
    return True


def can_remove_padding(family: str, *, writes: bool) -> bool:
    """Whether `remove_padding` knows a model_type, as a model that writes or as one with a head for texts."""
    return family in (_DECODERS if writes else _ENCODERS)


def takes_labels(model: torch.nn.Module) -> bool:
    """Whether `model` is a decoder without padding, which computes the logits of the labels that it is given."""
    return _attention(model) == DECODING


def removes_padding(model: torch.nn.Module) -> bool:
    """Whether `model` is one that `remove_padding` has changed."""
    return _attention(model) in (ENCODING, DECODING)


def _numbered(name: str, model: PreTrainedModel) -> str:
    return name.format(last=model.config.num_hidden_layers - 1)


def _attention(model: torch.nn.Module) -> str | None:
    config = getattr(model, "config", None)
    name: str | None = getattr(config, "_attn_implementation", None)
    return name


class _Encoder:
    """What is done to a batch on its way through an encoder and its head."""

    def __init__(self, model: PreTrainedModel, *, is_narrowed: bool) -> None:
        self._is_narrowed = is_narrowed
        self._means = getattr(model.config, "classifier_pooling", "cls") == "mean"
        tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
        self._offset = first_position(next(tables, None))
        self._rows: Rows | None = None

    def lay_end_to_end(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Padded rows (N, longest) → one row (1, T)."""
        self._rows, laid = None, None if args else _laid_end_to_end(model, kwargs, self._offset)
        if laid is None:
            return None
        if not self._means:
            laid["rows"] = replace(laid["rows"], kept=laid["rows"].starts)
        self._rows = laid["rows"]
        return args, laid

    def narrow(self, module: Any, args: tuple[Any, ...]) -> Any:
        """(1, T, d) each → (1, N, d): the first tokens."""
        return None if self._rows is None else tuple(x.index_select(1, self._rows.starts) for x in args)

    def pick(self, module: Any, args: Any, output: Any) -> Any:
        """Hidden states (1, T, d) → (N, 1, d): what the head reads."""
        if self._rows is None:
            return None
        hidden = output.last_hidden_state
        if self._means:
            hidden = means(hidden[0], self._rows)
        else:
            hidden = hidden[0] if self._is_narrowed else hidden[0, self._rows.starts]
        output.last_hidden_state = hidden[:, None]
        return output


class _Decoder:
    """What is done to a batch on its way through a decoder."""

    def __init__(self) -> None:
        self._rows: Rows | None = None

    def lay_end_to_end(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Padded rows (N, longest) with labels → one row (1, T), and the positions that predict a label."""
        import torch

        self._rows, labels = None, kwargs.pop("labels", None)
        laid = _laid_end_to_end(model, kwargs, 0) if labels is not None and not args else None
        kwargs.pop("owners", None)
        if laid is None:
            return args, kwargs
        row, place = (labels[:, 1:] >= 0).nonzero(as_tuple=True)
        kept = laid["rows"].starts[row] + place
        self._rows = replace(laid["rows"], kept=kept)
        # transformers takes a mask of four dimensions as it is, and builds none.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=labels.device)
        return args, {**laid, "rows": self._rows, "attention_mask": mask, "logits_to_keep": kept}

    def unwrap(self, model: Any, args: Any, output: Any) -> Any:
        """Logits (1, targets, vocabulary) → (targets, vocabulary)."""
        if self._rows is not None:
            output.logits = output.logits[0]
        return output


class _Armed:
    """Hooks on modules inside of one that is running, whatever modules these are by then: an adapter may have been put
    in their place. They are gone before its next run at the latest: a pass may break off.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def _disarm(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _LastLayer(_Armed):
    """What is done to the last layer: attention sees all tokens, and what follows only those that are read."""

    def __init__(self, last: _Last) -> None:
        super().__init__()
        self._last = last
        self._kept: torch.Tensor | None = None
        self._num_tokens = 0

    def begin(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the layer add to the kept ones of its input (1, T, d), and its attention begin with all of it."""
        self._disarm()
        rows = kwargs.get("rows")
        self._kept = kept = None if rows is None else rows.kept
        if kept is None:
            return None
        whole, *others = args
        self._num_tokens = whole.shape[1]
        norm, projection = (layer.get_submodule(name) for name in (self._last.norm, self._last.projection))
        self._handles = [
            norm.register_forward_pre_hook(lambda *_: (whole,)),
            projection.register_forward_pre_hook(lambda _, given: (given[0].index_select(1, kept),)),
        ]
        return (whole.index_select(1, kept), *others), kwargs

    def end(self, layer: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        """Put them where they were, zeros elsewhere: (1, T, d)."""
        import torch

        # The backward pass may compute what is inside of a layer again, without hooks on the layer itself.
        if not torch.is_grad_enabled():
            self._disarm()
        return None if self._kept is None else _put_back(output, self._kept, self._num_tokens)


class _FirstsAsk(_Armed):
    """What is done to the last attention: queries are computed of the first tokens alone."""

    def __init__(self, query: str) -> None:
        super().__init__()
        self._query = query

    def begin(self, attention: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let its query take those tokens, and tell `attend`."""
        self._disarm()
        rows = kwargs.get("rows")
        if rows is None:
            return None
        query, num_tokens = attention.get_submodule(self._query), args[0].shape[1]
        self._handles = [
            query.register_forward_pre_hook(lambda _, given: (given[0].index_select(1, rows.starts),)),
            query.register_forward_hook(lambda _, given, output: _put_back(output, rows.starts, num_tokens)),
        ]
        return args, {**kwargs, "rows": replace(rows, only_first=True)}

    def end(self, attention: Any, args: Any, output: Any) -> None:
        """Leave the query as it was."""
        self._disarm()


def _put_back(x: torch.Tensor, positions: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """(1, P, d) → (1, `num_tokens`, d): at these positions, zeros elsewhere."""
    return x.new_zeros(1, num_tokens, x.shape[-1]).index_copy_(1, positions, x)


def _laid_end_to_end(model: PreTrainedModel, kwargs: dict[str, Any], offset: int) -> dict[str, Any] | None:
    """The arguments of a model for padded rows → those for one row, positions counted from `offset`; None: they are not
    padded on the right.
    """
    mask, blocks, owners = kwargs.get("attention_mask"), kwargs.pop("blocks", None), kwargs.pop("owners", None)
    if mask is None or mask.ndim != 2 or kwargs.get("input_ids") is None:
        return None
    # All of it is decided on the CPU, so that a GPU is waited for once.
    mask = mask.cpu().bool()
    if not _is_padded_right(mask):
        return None
    device = kwargs["input_ids"].device
    rows, order = lay(mask.sum(1), device, blocks, owners, fills=_fills(model))
    chosen = mask[order]
    places = (chosen.cumsum(1) - 1)[chosen]
    flat: dict[str, Any] = {
        name: kwargs[name][order][chosen] for name in ("input_ids", "token_type_ids") if name in kwargs
    }
    flat["position_ids"] = places.to(device)
    if rows.num_tokens > len(places):
        spots = rows.starts[order].repeat_interleave(rows.lengths[order]) + places
        flat = {name: tokens.new_zeros(rows.num_tokens).index_copy_(0, spots, tokens) for name, tokens in flat.items()}
    laid = {name: tokens[None] for name, tokens in flat.items()}
    laid["position_ids"] += offset
    return {**kwargs, **laid, "attention_mask": None, "rows": rows}


def num_laid(model: PreTrainedModel, num_tokens: int) -> int:
    """How many tokens a block of so many becomes in a `model` without padding that computes in what is set up now."""
    from lora_cli.products import filled

    return filled(num_tokens) if _fills(model) else num_tokens


def _fills(model: PreTrainedModel) -> bool:
    """Whether its products are quick with some numbers of tokens."""
    import torch

    # The first weight may be one that trains, in fp32 whatever is computed in.
    is_plain = model.device.type == "cpu" and model.dtype == torch.float32
    return bool(is_plain and not torch.is_autocast_enabled("cpu"))


def first_position(table: object) -> int:
    """Number of a row's first position in a table of embeddings: RoBERTa counts from behind the pad token's."""
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def _is_padded_right(mask: torch.Tensor) -> bool:
    return bool(mask[:, 0].all()) and bool((mask[:, 1:] <= mask[:, :-1]).all())
