"""Which layers are adapted and which modules train whole, worked out before anything is touched. Knows names and types.

A name in `lora.targets`, `lora.rank_pattern` or `lora.alpha_pattern` is a whole module name, its dotted end
("attention.self.query"), or re:REGEX, which must match the whole name. In `lora.targets`, the first two may name
parts of a fused projection: "c_attn:q+v".
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from lora_cli.errors import ConfigError, UnknownName
from lora_cli.nn.convolutions import check_groups
from lora_cli.nn.embeddings import LoraEmbedding
from lora_cli.nn.fused import placement_of
from lora_cli.nn.inits import INITS, check_init
from lora_cli.nn.kinds import KINDS, kind_of, shape_of
from lora_cli.nn.layers import LoraLayer
from lora_cli.nn.quantized import QuantizedLinear, quantized_layers
from lora_cli.nn.tokens import vocabulary_layers
from lora_cli.nn.variants import VARIANTS
from lora_cli.spec import MAX_RANK, MAX_SCALING, LoraSpec

__all__ = [
    "ALL_LINEAR",
    "FULL",
    "LayerPlan",
    "Plan",
    "check_plan",
    "first_names",
    "is_inside",
    "outermost",
    "plan_adapter",
]

ALL_LINEAR = "all-linear"
"""The built-in group: every Linear and GPT-2's Conv1D that is not new, trained whole or the output embedding."""

FULL = "full"
"""The variant without an adapter: every parameter trains, tied ones as one."""

_KINDS = ", ".join(kind.__name__.removeprefix("Lora") for kind in KINDS)


@dataclass(frozen=True)
class LayerPlan:
    """One layer to adapt."""

    pattern: str
    """The entry of `lora.targets` that chose it."""
    r: int
    """Rank."""
    alpha: float
    """Numerator of the scaling."""
    parts: tuple[str, ...] = ()
    """Parts of a fused projection, each of rank r; empty: the whole layer."""
    kept: tuple[int, ...] | None = None
    """Of AdaLoRA, numbers of the ranks that a file holds; None: all."""


@dataclass(frozen=True)
class Plan:
    """What an adapter does to one model."""

    layers: Mapping[str, LayerPlan]
    """Module name → how it is adapted, in the model's order."""
    whole: tuple[str, ...]
    """Modules that train whole, none inside another."""
    left_out: tuple[str, ...] = ()
    """Ends of the names of matrices that an entry covers, but that are not adapted."""
    new_rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Embedding or output layer, the first of those that share its weight → numbers of its rows that train."""


def plan_adapter(
    model: nn.Module,
    spec: LoraSpec,
    *,
    groups: Mapping[str, Sequence[str]],
    fresh: Sequence[str],
    skip: Sequence[str],
    new_rows: Sequence[int] = (),
) -> Plan:
    """Resolve `spec` against `model`, changing neither.

    Raises:
        UnknownName: a target, pattern or module that matches nothing.
        ConfigError: an entry that matches no layer of a kind that can be adapted, or a choice that this model
            does not allow.
    """
    if spec.variant == FULL:
        return Plan({}, tuple(fresh))
    names = first_names(model)
    whole = outermost([*fresh, *_saved_whole(spec, names)])
    chosen, left_out = _targets(model, spec, groups, names, whole, skip)
    ranks = _overrides("lora.rank_pattern", spec.rank_pattern, chosen)
    alphas = _overrides("lora.alpha_pattern", spec.alpha_pattern, chosen)
    layers = {
        name: LayerPlan(pattern, int(ranks.get(name, spec.r)), float(alphas.get(name, spec.alpha)), parts)
        for name, (pattern, parts) in chosen.items()
    }
    if not layers and not whole and spec.bias != "all" and not new_rows:
        raise ConfigError("lora.targets", "[]", "nothing would train: this model has no fresh head; name layers")
    plan = Plan(layers, whole, left_out, _rows_outside(model, new_rows, whole))
    check_plan(model, plan, spec)
    return plan


def check_plan(model: nn.Module, plan: Plan, spec: LoraSpec) -> None:
    """That `model` allows `plan`.

    Raises:
        ConfigError: a rank that does not fit its layer, parts that it does not have, a variant or an init that is not
            for it, a weight tied to another module, a module with state beside its parameters, a layer whose rows of
            new tokens train besides.
    """
    _check_rows(model, plan, spec)
    for name, layer in plan.layers.items():
        _check_layer(model, name, layer, spec)
    _check_ties(model, plan)
    for name in plan.whole:
        module = model.get_submodule(name)
        if quantized_layers(module):
            raise ConfigError("lora.modules_to_save", name, "is quantised (model.quantization), so it cannot train")
        state = sorted(module.state_dict().keys() - dict(module.named_parameters(remove_duplicate=False)).keys())
        if state:
            raise ConfigError("lora.modules_to_save", name, f"has state that does not train ({state[0]})")


def _check_layer(model: nn.Module, name: str, layer: LayerPlan, spec: LoraSpec) -> None:
    base, variant, init = model.get_submodule(name), VARIANTS[spec.variant], INITS[spec.init]
    rows, columns = shape_of(model, name)
    if layer.parts:
        rows = _check_parts(model, name, layer, spec)
    kind = kind_of(base)
    assert kind is not None, "a plan holds what can be adapted"
    if variant.frozen == ("A",) and kind is LoraEmbedding:
        raise ConfigError("lora.variant", spec.variant, f"not for an embedding ({name}), whose A starts at zero")
    key = "lora.r" if layer.r == spec.r else "lora.rank_pattern"
    groups = check_groups(base, name, key, layer.r, spec.variant)
    if variant.scope == "linear" and not kind.is_projection:
        raise ConfigError("lora.variant", spec.variant, f"only for linear layers; {name} is {_class(model, name)}")
    most, of_init = min(rows, groups * columns), ""
    if init.is_residual:
        most, of_init = most // 2, f" with lora.init={spec.init}, saved as twice it"
    # What is random and frozen gains from a rank above a layer's size.
    if layer.r > most and not variant.is_shared:
        raise ConfigError(key, layer.r, f"at most {most} for {name}, which is {rows} × {columns}{of_init}")
    check_init(
        spec.init,
        name,
        layer.r // groups,
        is_embedding=kind is LoraEmbedding,
        is_projection=kind.is_projection,
        has_original=isinstance(base, QuantizedLinear) and base.original is not None,
    )


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of every module → the first name of that module: a shared one has several."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(m), name) for name, m in model.named_modules(remove_duplicate=False) if name}


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether `name` is one of `modules` or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def outermost(names: Iterable[str]) -> tuple[str, ...]:
    """`names` without repetition and without those inside another, in order."""
    unique = list(dict.fromkeys(names))
    return tuple(name for name in unique if not is_inside(name, [other for other in unique if other != name]))


def _targets(
    model: nn.Module,
    spec: LoraSpec,
    groups: Mapping[str, Sequence[str]],
    names: Mapping[str, str],
    whole: Sequence[str],
    skip: Sequence[str],
) -> tuple[dict[str, tuple[str, tuple[str, ...]]], tuple[str, ...]]:
    """Layer → the first entry of `lora.targets` that matches it and its parts, in the model's order; and `left_out`."""
    kinds = {name: kind_of(model.get_submodule(name)) for name in dict.fromkeys(names.values())}
    free = [name for name, kind in kinds.items() if kind and not is_inside(name, whole)]
    opaque = [
        name for name, kind in kinds.items() if not kind and _has_matrix(model, name) and not is_inside(name, whole)
    ]
    chosen: dict[str, tuple[str, tuple[str, ...]]] = {}
    left_out: set[str] = set()
    found: dict[str, tuple[str, ...]]
    for entry in spec.targets:
        if entry == ALL_LINEAR:
            linears = [name for name in free if (kind := kinds[name]) and kind.is_projection]
            unlinear = {name for name in free if name not in linears or is_inside(name, skip)}
            left_out |= {name for name in unlinear if _has_matrix(model, name)}
            found = {name: () for name in [*linears, *opaque] if not is_inside(name, skip)}
        else:
            found = _with_parts(entry, groups.get(entry, [entry]), names)
        if found.keys().isdisjoint(free):
            raise _refusal(model, entry, found, kinds, [*groups, ALL_LINEAR, *_shown(free, kinds)])
        left_out |= found.keys() & set(opaque)
        for name in free:
            if name in found and chosen.setdefault(name, (entry, found[name]))[1] != found[name]:
                raise _overlap(entry, chosen[name][0], name)
    ends = dict.fromkeys(_without_index(name) for name in kinds if name in left_out - chosen.keys())
    return {name: chosen[name] for name in free if name in chosen}, tuple(ends)


def _with_parts(entry: str, patterns: Iterable[str], names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Module → its parts, for all that the patterns of one entry match."""
    found: dict[str, tuple[str, ...]] = {}
    for pattern in patterns:
        end, colon, text = (pattern, "", "") if pattern.startswith("re:") else pattern.partition(":")
        parts = tuple(text.split("+")) if colon else ()
        for name in sorted(_matching("lora.targets", [end], names)):
            if found.setdefault(name, parts) != parts:
                raise _overlap(entry, pattern, name)
    return found


def _overlap(entry: str, other: str, name: str) -> ConfigError:
    # Which one wins would be a guess.
    return ConfigError("lora.targets", entry, f"'{other}' takes other parts of {name}; name them in one entry")


def _refusal(
    model: nn.Module, entry: str, found: Collection[str], kinds: Mapping[str, object], options: Sequence[str]
) -> ConfigError:
    """Why none of the modules that `entry` matches can be adapted."""
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters() if f".{name}".endswith(f".{entry}")}
    experts = sorted(name for name in {*found, *owners} if _has_experts(model, name))
    if experts:
        (inner, weight), *_ = model.get_submodule(experts[0]).named_parameters()
        reason = (
            f"all experts in one {weight.ndim}-D parameter ({inner}), which no adapter here reaches; target attention"
        )
        return ConfigError("lora.targets", entry, f"'{experts[0]}' keeps {reason}")
    if not found:
        return UnknownName("lora.targets", entry, options, "layer")
    name = min(found)
    if any(kinds[name] for name in found):
        return ConfigError("lora.targets", entry, f"'{name}' trains whole already; name other layers")
    return ConfigError("lora.targets", entry, f"'{name}' is a {_class(model, name)}; only {_KINDS} can be adapted")


def _shown(names: Iterable[str], kinds: Mapping[str, type[LoraLayer] | None]) -> Iterator[str]:
    """Names to choose from, short enough to list: embeddings stand alone, other layers repeat in each block."""
    for name in names:
        kind = kinds[name]
        yield _without_index(name) if kind and kind.is_projection else name.rpartition(".")[2]


def _has_matrix(model: nn.Module, name: str) -> bool:
    """Whether a module multiplies by a parameter of its own; an embedding only looks up in it."""
    module = model.get_submodule(name)
    own = module.parameters(recurse=False)
    return not isinstance(module, nn.Embedding) and any(parameter.ndim > 1 for parameter in own)


def _has_experts(model: nn.Module, name: str) -> bool:
    own = list(model.get_submodule(name).parameters(recurse=False))
    return any(parameter.ndim == 3 for parameter in own) and "expert" in name


def _check_parts(model: nn.Module, name: str, layer: LayerPlan, spec: LoraSpec) -> int:
    """The number of outputs of the smallest part."""
    placement = placement_of(model, name, layer.parts, shape_of(model, name)[0])
    if VARIANTS[spec.variant].scope != "any":
        raise ConfigError("lora.variant", spec.variant, f"not for parts of a fused projection ({name}); adapt it whole")
    # On disk the parts are one update of rank k·r, and must be allowed as such.
    num_parts = len(layer.parts)
    num_updates = num_parts * (2 if INITS[spec.init].is_residual else 1)
    if num_updates * layer.r > MAX_RANK:
        raise ConfigError("lora.r", layer.r, f"at most {MAX_RANK // num_updates} for each of {num_parts} parts")
    if num_updates * layer.alpha > MAX_SCALING:
        raise ConfigError("lora.alpha", layer.alpha, f"at most {MAX_SCALING / num_updates:g} for {num_parts} parts")
    return int(placement.part.bincount().min())


def _saved_whole(spec: LoraSpec, names: Mapping[str, str]) -> list[str]:
    saved: list[str] = []
    for entry in spec.modules_to_save:
        found = _matching("lora.modules_to_save", [entry], names)
        if not found:
            raise UnknownName("lora.modules_to_save", entry, (name.rsplit(".", 1)[-1] for name in names), "module")
        saved += sorted(found)
    return saved


def _rows_outside(model: nn.Module, new_rows: Sequence[int], whole: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Layer → its rows that train, unless it trains whole."""
    if not new_rows:
        return {}
    layers = vocabulary_layers(model)
    if not layers:
        raise ConfigError("model.add_tokens", len(new_rows), "the model does not tell which layer is its embedding")
    outside = [name for name, names in layers.items() if not all(is_inside(each, whole) for each in names)]
    return dict.fromkeys(outside, tuple(new_rows))


def _check_rows(model: nn.Module, plan: Plan, spec: LoraSpec) -> None:
    if plan.new_rows and VARIANTS[spec.variant].scope == "linear":
        raise ConfigError("model.add_tokens", "", f"not with lora.variant={spec.variant}: PEFT has no place for them")
    layers = vocabulary_layers(model) if plan.new_rows else {}
    for first in plan.new_rows:
        for name in layers[first]:
            key = "lora.targets" if name in plan.layers else "lora.modules_to_save"
            if name in plan.layers or is_inside(name, plan.whole):
                raise ConfigError(key, name, "its rows of new tokens train (model.add_tokens); leave it out")
            if spec.bias == "all" and getattr(model.get_submodule(name), "bias", None) is not None:
                raise ConfigError("lora.bias", "all", f"not with new tokens here: {name} has a bias; lora_only or none")


def _overrides(key: str, patterns: Mapping[str, float], layers: Collection[str]) -> dict[str, float]:
    """Layer → its own value. A layer that two patterns match is refused: which one wins would be a guess."""
    values: dict[str, float] = {}
    source: dict[str, str] = {}
    own_names = {name: name for name in layers}
    for pattern, value in patterns.items():
        found = _matching(key, [pattern], own_names)
        if not found:
            raise UnknownName(key, pattern, map(_without_index, layers), "adapted layer")
        for name in sorted(found):
            if name in source:
                raise ConfigError(key, pattern, f"and '{source[name]}' both match {name}; keep one")
            source[name], values[name] = pattern, value
    return values


def _matching(key: str, patterns: Iterable[str], names: Mapping[str, str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("re:"):
            regex = _regex(key, pattern)
            found |= {first for name, first in names.items() if regex.fullmatch(name)}
        else:
            found |= {first for name, first in names.items() if f".{name}".endswith(f".{pattern}")}
    return found


def _regex(key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise ConfigError(key, pattern, f"not a regular expression: {error}") from error


def _check_ties(model: nn.Module, plan: Plan) -> None:
    """A parameter of two modules cannot be trained in one of them only."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(name)
    keys = [("lora.targets", name) for name in plan.layers] + [("lora.modules_to_save", name) for name in plan.whole]
    for key, name in keys:
        for parameter in model.get_submodule(name).parameters():
            others = [owner for owner in owners[id(parameter)] if not is_inside(owner, [name])]
            if others:
                raise ConfigError(key, name, f"shares its weight with '{others[0]}', so it cannot be trained alone")


def _without_index(name: str) -> str:
    """The part after the last number, which is the same in every block: encoder.layer.3.output.dense → output.dense."""
    return re.sub(r"^.*\.\d+\.(?=.)", "", name)


def _class(model: nn.Module, name: str) -> str:
    return type(model.get_submodule(name)).__name__
