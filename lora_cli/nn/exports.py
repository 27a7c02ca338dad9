"""An adapter rewritten for the engine that is to load it: scalings folded in, ranks made equal, names as it wants them.

Knows formats, runs no engine; what an engine has no place for is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lora_cli.errors import AdapterError, printable
from lora_cli.nn.passport import traits
from lora_cli.nn.peft_tensors import PREFIX
from lora_cli.nn.stored import Factors, StoredAdapter

__all__ = ["TARGETS", "check_target", "folded", "loralib_state", "portable"]

TARGETS: Mapping[str, frozenset[str]] = {
    "peft": frozenset({"dora", "whole", "biases", "rows", "embeddings", "convolutions", "geometry"}),
    "vllm": frozenset({"embeddings"}),
    "sglang": frozenset(),
    "tgi": frozenset(),
    "lorax": frozenset(),
    "llamacpp": frozenset({"embeddings"}),
    "loralib": frozenset({"whole", "biases", "embeddings"}),
}
"""`target` of lora export → what it takes beside A and B of linear layers."""

_RANKS = (8, 16, 32, 64, 128, 256)
"""Ranks for which the engines have kernels."""
_SETTLED = ("ranks", "alphas", "rslora", "high")
"""Traits that folding and padding settle, or that only need a word."""
_FUSED = ("q", "k", "v")
"""Parts of GPT-2's c_attn: three equal blocks of outputs, as loralib's MergedLinear has them."""


def check_target(stored: StoredAdapter, target: str) -> None:
    """Refuse what an engine has no place for.

    Raises:
        AdapterError: it names what that is, and what to do instead.
    """
    found = [text for trait, text in traits(stored).items() if trait not in (*TARGETS[target], *_SETTLED)]
    if found:
        raise AdapterError(
            f"target={target}: has no place for {printable(', '.join(found), 150)}; "
            "lora merge writes a plain model, target=peft keeps all of it"
        )
    if not stored.layers:
        raise AdapterError(f"target={target}: no layer is adapted here")


def portable(stored: StoredAdapter) -> tuple[StoredAdapter, list[str]]:
    """The same updates in the settings that all engines read alike, and what was changed for that.

    One rank that engines have kernels for, alpha = r, no patterns, targets by the last word of their names.
    """
    changed = []
    last_words = sorted({name.rpartition(".")[2] for name in stored.layers})
    config = {key: value for key, value in stored.config.items() if key != "exclude_modules"}
    if config.get("target_modules") != last_words:
        changed.append(f"target_modules are the last words of names: {', '.join(last_words)}")
    most = max(layer.r for layer in stored.layers.values())
    rank = next((rank for rank in _RANKS if rank >= most), most)
    result, more = folded(replace(stored, config=config | {"target_modules": last_words}), rank)
    return result, changed + more


def folded(stored: StoredAdapter, rank: int) -> tuple[StoredAdapter, list[str]]:
    """The same updates with one rank, zeros added, and one scaling; B is multiplied only where it has to be."""
    changed = []
    layers = dict(stored.layers)
    ranks = {layer.r for layer in layers.values()}
    scalings = {layer.scaling for layer in layers.values()}
    # A plain alpha survives padding as another plain alpha, and B stays as it is to the last bit.
    alpha = next(iter(scalings)) * rank
    if len(scalings) > 1 or alpha != int(alpha):
        layers = {name: _with_scaling_one(layer) for name, layer in layers.items()}
        changed.append(f"scalings {_range(scalings)} are multiplied into B, alpha = r = {rank}")
    elif stored.config.get("use_rslora"):
        changed.append(f"alpha/√r is written as alpha/r with alpha {int(alpha)}")
    if ranks != {rank}:
        layers = {name: _padded(layer, rank) for name, layer in layers.items()}
        changed.append(f"rank {_range(ranks)} is filled up with zeros to {rank}")
    return stored.with_layers(layers), changed


def loralib_state(stored: StoredAdapter) -> tuple[dict[str, Tensor], dict[str, dict[str, object]]]:
    """What `loralib.lora_state_dict` returns for these updates, and module → the arguments that its layer needs.

    Raises:
        AdapterError: parts of a fused projection that are no equal blocks.
    """
    state: dict[str, Tensor] = {}
    arguments: dict[str, dict[str, object]] = {}
    for name, layer in stored.layers.items():
        A, B, r = layer.A, layer.B, layer.r
        alpha = layer.scaling * layer.r
        own: dict[str, object] = {"class": "Embedding" if layer.is_embedding else "Linear"}
        if name in stored.parts:
            parts, r = stored.parts[name].parts, stored.parts[name].r
            B, alpha = _blocks(name, B, parts), layer.scaling * r
            own = {"class": "MergedLinear", "enable_lora": [part in parts for part in _FUSED]}
        state |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
        arguments[name] = own | {"r": r, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha}
    for key, tensor in stored.others.items():
        state[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = tensor
    return {key: tensor.float().clone() for key, tensor in state.items()}, arguments


def _blocks(name: str, B_OR: Tensor, parts: tuple[str, ...]) -> Tensor:
    """B of loralib's MergedLinear (out/3·k, r): the blocks of the parts under each other."""
    fits = set(parts) <= set(_FUSED) and len(B_OR) % len(_FUSED) == 0
    if fits:
        outputs = [B_OR.chunk(len(_FUSED))[_FUSED.index(part)] for part in parts]
        blocks = [rows.chunk(len(parts), dim=1)[number] for number, rows in enumerate(outputs)]
        stacked = torch.cat(blocks)
        if stacked.count_nonzero() == B_OR.count_nonzero():
            return stacked
    raise AdapterError(f"{printable(name, 90)}: its parts ({', '.join(parts)}) are no three equal blocks of outputs")


def _with_scaling_one(layer: Factors) -> Factors:
    return replace(layer, B=(layer.scaling * layer.B.double()).float(), scaling=1.0)


def _padded(layer: Factors, rank: int) -> Factors:
    A = layer.A.new_zeros(rank, *layer.A.shape[1:])
    B = layer.B.new_zeros(len(layer.B), rank, *layer.B.shape[2:])
    A[: layer.r], B[:, : layer.r] = layer.A, layer.B
    return replace(layer, A=A, B=B)


def _range(values: set[int] | set[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
