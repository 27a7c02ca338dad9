"""Arithmetic of adapters: their updates weighted and added, exactly or at a smaller rank. Knows no file and no model.

With updates Δᵢ = sᵢ·Bᵢ·Aᵢ and weights wᵢ: `concat` stacks the factors, so that its update is Σ wᵢΔᵢ (the update of
PEFT's "cat"); `svd` is the best update of a given rank to that sum (Eckart and Young 1936); `linear` mixes the factors
themselves, A = Σ ±√|wᵢsᵢ|·Aᵢ and B = Σ √|wᵢsᵢ|·Bᵢ, as PEFT's "linear" does: of one rank, but with terms BᵢAⱼ besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_cli.errors import AdapterError, ConfigError, listed, printable
from lora_cli.nn.stored import Factors, StoredAdapter, targets_of

__all__ = ["METHODS", "combine", "truncated"]

_REST = ("bias", "modules_to_save", "task_type", "trainable_token_indices")
"""Settings of what is no update."""

Terms = Sequence[tuple[float, Factors]]
"""(weight, update) of the adapters that have a layer."""


def combine(
    adapters: Sequence[StoredAdapter],
    weights: Sequence[float],
    *,
    method: str = "concat",
    rank: int | None = None,
    head: int | None = None,
    force_base: bool = False,
) -> StoredAdapter:
    """One adapter of the weighted sum of several; a layer that only some have is theirs alone.

    An adapter of weight 0 takes no part; if one is left, it is that one with its update scaled, and for weight 1 the
    same to the last bit. `rank` is that of `svd`; None: as many as the sum needs. What is no update (biases,
    modules trained whole, rows of new tokens, label names) is that of the adapter number `head`, counted from 1.

    Raises:
        AdapterError: other bases or shapes, DoRA, or such parts of which it is not said whose they should be.
    """
    chosen = [(weight, adapter) for weight, adapter in zip(weights, adapters, strict=True) if weight]
    if not chosen:
        raise ConfigError("weights", list(weights), "at least one that is not 0")
    rest = adapters[head - 1] if head is not None else None
    members = [adapter for _, adapter in chosen]
    _check_bases([*members, *([rest] if rest else [])], force_base)
    if len(chosen) == 1 and method != "svd":
        return _scaled(*chosen[0], rest)
    _check_sum(members, rest)
    names = sorted({name for adapter in members for name in adapter.layers})
    layers = {
        name: METHODS[method](name, [(weight, a.layers[name]) for weight, a in chosen if name in a.layers], rank)
        for name in names
    }
    base = rest or members[0]
    config = {**base.config, "target_modules": targets_of(members)}
    config.pop("exclude_modules", None)
    return replace(base, config=config).with_layers(layers)


def truncated(name: str, terms: Terms, rank: int | None) -> Factors:
    """The best update of this rank to the sum, or of all the rank that the sum has; in fp64, rounded once.

    A layer whose sum has less is given less.
    """
    A_RI, B_OR = _stacked(terms)
    (left, core_left), (right, core_right) = torch.linalg.qr(B_OR), torch.linalg.qr(A_RI.T)
    U, values, V = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    r = min(rank or len(values), len(values))
    # Shared evenly, so that neither factor is large; the scaling is 1.
    roots = values[:r].sqrt()
    return _like(name, terms, roots[:, None] * (right @ V[:r].T).T, (left @ U[:, :r]) * roots)


def _concatenated(name: str, terms: Terms, rank: int | None) -> Factors:
    A_RI, B_OR = _stacked(terms)
    # No layer can have a rank above its size; the same update has factors of that rank.
    return (
        _like(name, terms, A_RI, B_OR) if len(A_RI) <= min(A_RI.shape[1], len(B_OR)) else truncated(name, terms, None)
    )


def _mixed(name: str, terms: Terms, rank: int | None) -> Factors:
    ranks = {term.r for _, term in terms}
    if len(ranks) > 1:
        raise AdapterError(f"{printable(name, 90)} has ranks {sorted(ranks)}: method=linear needs one; concat does not")
    roots = [(math.copysign(math.sqrt(abs(w * t.scaling)), w), t) for w, t in terms]
    A_RI = torch.stack([root * term.A.double().flatten(1) for root, term in roots]).sum(0)
    B_OR = torch.stack([abs(root) * term.B.double().flatten(1) for root, term in roots]).sum(0)
    return _like(name, terms, A_RI, B_OR)


METHODS: Mapping[str, Callable[[str, Terms, int | None], Factors]] = {
    "concat": _concatenated,
    "svd": truncated,
    "linear": _mixed,
}
"""`method` of lora combine → (name of the layer, terms, rank) → one update."""


def _stacked(terms: Terms) -> tuple[Tensor, Tensor]:
    """A (Σr, in) and B (out, Σr) of the sum, in fp64."""
    pairs = [(term.matrices(), weight) for weight, term in terms]
    return torch.cat([A for (A, _), _ in pairs]), torch.cat([weight * B for (_, B), weight in pairs], dim=1)


def _like(name: str, terms: Terms, A_RI: Tensor, B_OR: Tensor) -> Factors:
    """These factors, of scaling 1, in the shape and of the kind of the terms."""
    first = terms[0][1]
    if any(term.groups > 1 for _, term in terms):
        raise AdapterError(f"{printable(name, 90)} is a convolution in groups, whose updates cannot be combined")
    A, B = A_RI.float().reshape(-1, *first.A.shape[1:]), B_OR.float().reshape(len(B_OR), -1, *first.B.shape[2:])
    return Factors(A.contiguous(), B.contiguous(), 1.0, first.is_embedding)


def _scaled(weight: float, adapter: StoredAdapter, rest: StoredAdapter | None) -> StoredAdapter:
    if weight != 1 and adapter.magnitudes:
        raise _dora(adapter)
    if rest is not None and rest is not adapter:
        _check_sum([adapter], rest)
        config = {**adapter.config, **{key: rest.config.get(key) for key in _REST}}
        facts = {**rest.facts, **({"parts": adapter.facts["parts"]} if "parts" in adapter.facts else {})}
        adapter = replace(adapter, config=config, others=rest.others, facts=facts)
    return replace(adapter, layers={name: layer.scaled(weight) for name, layer in adapter.layers.items()})


def _check_bases(adapters: Sequence[StoredAdapter], force: bool) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        prints = [adapter.facts.get("fingerprint") for adapter in (first, other)]
        names = [adapter.config.get("base_model_name_or_path") for adapter in (first, other)]
        known = prints if None not in prints else names
        if not force and None not in known and known[0] != known[1]:
            shown = " and ".join(printable(name, 50) for name in names)
            raise AdapterError(
                f"{other.source}: it was trained on another base model than {first.source} ({shown}); "
                "force_base=true combines them nevertheless"
            )
    for adapter in adapters[1:]:
        for name in first.layers.keys() & adapter.layers.keys():
            sizes = [(layer.A.shape[1:], layer.B.shape[0]) for layer in (first.layers[name], adapter.layers[name])]
            if sizes[0] != sizes[1] or first.layers[name].is_embedding != adapter.layers[name].is_embedding:
                raise AdapterError(f"{adapter.source}: {printable(name, 90)} has another shape than in {first.source}")


def _check_sum(members: Sequence[StoredAdapter], rest: StoredAdapter | None) -> None:
    """That a sum means something: no DoRA, and of what is no update it is clear whose it is."""
    for adapter in members:
        if adapter.magnitudes:
            raise _dora(adapter)
    if rest is not None:
        if rest.magnitudes:
            raise _dora(rest)
        return
    first = members[0]
    for other in members[1:]:
        differing = [
            key
            for key in sorted(first.others.keys() | other.others.keys())
            if key not in first.others or key not in other.others or not _same(first.others[key], other.others[key])
        ]
        if other.facts.get("extra") != first.facts.get("extra"):
            differing.append("label names in lora.json")
        if differing:
            names = listed([key.removeprefix("base_model.model.") for key in differing], 80)
            raise AdapterError(
                f"{other.source}: {names} are no update and differ from those in {first.source}; "
                "head=1 takes those of the first adapter, head=2 of the second"
            )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _dora(adapter: StoredAdapter) -> AdapterError:
    return AdapterError(
        f"{adapter.source}: DoRA's rows get their lengths after the update, so its update is no sum; "
        "lora merge makes a plain model of it"
    )
