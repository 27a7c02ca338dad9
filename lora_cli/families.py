"""What the layers of each architecture are called. Knows names only: no torch, no checkpoint.

Names are dotted suffixes of module names as they are in memory (not as on disk), or `re:` and a
regular expression of the whole name where one suffix ends another (`attention.output.dense`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["FAMILIES", "Family", "layer_groups"]


@dataclass(frozen=True)
class Family:
    """The layers of one architecture: what LoRA adapts unless told otherwise, and all of both blocks.

    `default` is query and value, as in the paper (arXiv:2106.09685, section 7.1), or the fused
    projection that holds them. `undeclared` are settings that the model reads though transformers'
    config class does not list them.
    """

    default: tuple[str, ...]
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    undeclared: tuple[str, ...] = ()


_FEED_FORWARD = ("intermediate.dense", r"re:.*\.layer\.\d+\.output\.dense")
_BERT = Family(
    default=("attention.self.query", "attention.self.value"),
    attention=("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    mlp=_FEED_FORWARD,
)

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "distilbert": Family(
        default=("attention.q_lin", "attention.v_lin"),
        attention=("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        mlp=("ffn.lin1", "ffn.lin2"),
    ),
    "albert": Family(
        default=("attention.query", "attention.value"),
        attention=("attention.query", "attention.key", "attention.value", "attention.dense"),
        mlp=("ffn", "ffn_output"),
    ),
    "deberta": Family(
        default=("attention.self.in_proj",),
        attention=(
            "attention.self.in_proj",
            "attention.self.pos_proj",
            "attention.self.pos_q_proj",
            "attention.output.dense",
        ),
        mlp=_FEED_FORWARD,
    ),
    "deberta-v2": Family(
        default=("attention.self.query_proj", "attention.self.value_proj"),
        attention=(
            "attention.self.query_proj",
            "attention.self.key_proj",
            "attention.self.value_proj",
            "attention.output.dense",
        ),
        mlp=_FEED_FORWARD,
        undeclared=("share_att_key", "position_buckets", "norm_rel_ebd"),
    ),
    "modernbert": Family(default=("attn.Wqkv",), attention=("attn.Wqkv", "attn.Wo"), mlp=("mlp.Wi", "mlp.Wo")),
}
"""transformers' model_type → its layers."""


def layer_groups(model_type: str, default: Sequence[str] | None = None) -> dict[str, tuple[str, ...]]:
    """The names that lora.targets may use for several layers at once → the layers.

    `default` replaces the family's own default. A family that is not in the table has no groups
    besides that one: its layers must be named, or all-linear taken.
    """
    family = FAMILIES.get(model_type)
    groups = {"default": family.default, "attention": family.attention, "mlp": family.mlp} if family else {}
    return groups | ({"default": tuple(default)} if default else {})
