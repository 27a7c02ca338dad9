"""Fused projections: which outputs of one weight are the query's, the key's, the value's. Knows layouts, not layers.

A layout is found by `model_type` in the config that a model carries; transformers is not imported.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_cli.errors import ConfigError, UnknownName

__all__ = ["LAYOUTS", "Layout", "Placement", "placement_of"]

Layout = Callable[[Any, int], dict[str, Tensor]]
"""(the model's config, number of outputs) → part → the numbers of its outputs, in order."""

_QKV = ("q", "k", "v")


class Placement(nn.Module):
    """Chosen parts of a fused projection, and where their outputs lie in it.

    Shapes: P outputs in the k chosen parts, O outputs in all; B (P, r), spread over all outputs (O, k·r).
    """

    rows: Tensor
    part: Tensor
    outside: ClassVar[str] = "is not zero outside of its parts"
    """What is wrong with a tensor in a file that `spread` would not have made."""

    def __init__(self, parts: Mapping[str, Tensor], out_features: int) -> None:
        super().__init__()
        self.parts = tuple(parts)
        """Names of the chosen parts, in the weight's order."""
        self.out_features = out_features
        """Outputs of the whole projection."""
        numbers = [torch.full_like(rows, number) for number, rows in enumerate(parts.values())]
        # Buffers, so that they follow the layer to its device; not in its state, being no result of training.
        self.register_buffer("rows", torch.cat([*parts.values()]), persistent=False)
        self.register_buffer("part", torch.cat(numbers), persistent=False)

    @property
    def num_rows(self) -> int:
        """Outputs of the chosen parts together."""
        return self.rows.numel()

    def spread(self, B_PR: Tensor) -> Tensor:
        """The one B that, applied to the stacked A, computes each part from its own A; zero elsewhere."""
        blocks = B_PR.new_zeros(self.out_features, len(self.parts), B_PR.shape[1])
        return blocks.index_put((self.rows, self.part), B_PR).flatten(1)

    def gather(self, spread: Tensor) -> Tensor:
        """What `spread` was made of."""
        blocks = spread.view(self.out_features, len(self.parts), -1)
        return blocks[self.rows.to(spread.device), self.part.to(spread.device)]


def placement_of(model: nn.Module, name: str, parts: Sequence[str], out_features: int) -> Placement:
    """Where `parts` lie in the outputs of the layer called `name`.

    Raises:
        UnknownName: a part that the layer does not have.
        ConfigError: a layer whose parts are not known, or of which a part is named twice.
    """
    entry = f"{name}:{'+'.join(parts)}"
    config = getattr(model, "config", None)
    known = LAYOUTS.get(getattr(config, "model_type", ""), {})
    layout = next((known[end] for end in known if f".{name}".endswith(f".{end}")), None)
    if layout is None:
        fused = ", ".join(known) or "none"
        raise ConfigError("lora.targets", entry, f"it is not known to be fused; projections with parts here: {fused}")
    rows = layout(config, out_features)
    for part in parts:
        if part not in rows:
            raise UnknownName("lora.targets", entry, rows, f"part '{part}'")
    if len(set(parts)) != len(parts):
        raise ConfigError("lora.targets", entry, "each part once")
    return Placement({part: rows[part] for part in rows if part in parts}, out_features)


def _blocks(sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """One part after the other."""
    ends = list(itertools.accumulate(sizes.values()))
    return {part: torch.arange(end - sizes[part], end) for part, end in zip(sizes, ends, strict=True)}


def _equal_blocks(*parts: str) -> Layout:
    return lambda config, outputs: _blocks(dict.fromkeys(parts, outputs // len(parts)))


def _heads(config: Any, outputs: int) -> dict[str, Tensor]:
    """Head after head, and in each one its query, key and value."""
    rows_HPD = torch.arange(outputs).view(config.num_attention_heads, len(_QKV), -1)
    return {part: rows_HPD[:, number].flatten() for number, part in enumerate(_QKV)}


def _falcon(config: Any, outputs: int) -> dict[str, Tensor]:
    if config.new_decoder_architecture or config.multi_query:
        kind = "grouped" if config.new_decoder_architecture else "multi"
        raise ConfigError(
            "lora.targets",
            "query_key_value",
            f"no parts: this Falcon has {kind}-query attention, whose keys are shared by heads; adapt it whole",
        )
    return _heads(config, outputs)


def _phi3(config: Any, outputs: int) -> dict[str, Tensor]:
    per_group = outputs // (config.num_attention_heads + 2 * config.num_key_value_heads)
    shared = config.num_key_value_heads * per_group
    return _blocks({"q": config.num_attention_heads * per_group, "k": shared, "v": shared})


LAYOUTS: dict[str, dict[str, Layout]] = {
    "bloom": {"self_attention.query_key_value": _heads},
    "deberta": {"attention.self.in_proj": _heads},
    "falcon": {"self_attention.query_key_value": _falcon},
    "gpt2": {"attn.c_attn": _equal_blocks(*_QKV)},
    "gpt_neox": {"attention.query_key_value": _heads},
    "modernbert": {"attn.Wqkv": _equal_blocks(*_QKV), "mlp.Wi": _equal_blocks("input", "gate")},
    "phi3": {"self_attn.qkv_proj": _phi3, "mlp.gate_up_proj": _equal_blocks("gate", "up")},
}
"""transformers' model_type → dotted end of a fused layer's name → its layout."""
