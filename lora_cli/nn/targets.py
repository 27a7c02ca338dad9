"""Which layers are adapted and which modules train whole, worked out before anything is touched. Knows names and types.

A name in `lora.targets`, `lora.rank_pattern` or `lora.alpha_pattern` is a whole module name, its dotted end
("attention.self.query"), or re:REGEX, which must match the whole name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lora_cli.errors import ConfigError, UnknownName
from lora_cli.spec import LoraSpec

__all__ = ["ALL_LINEAR", "LayerPlan", "Plan", "check_plan", "first_names", "is_inside", "outermost", "plan_adapter"]

ALL_LINEAR = "all-linear"
"""The built-in group: every Linear that is not new, trained whole or the output embedding."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer to adapt."""

    pattern: str
    """The entry of `lora.targets` that chose it."""
    r: int
    """Rank."""
    alpha: float
    """Numerator of the scaling."""


@dataclass(frozen=True)
class Plan:
    """What an adapter does to one model."""

    layers: Mapping[str, LayerPlan]
    """Module name → how it is adapted, in the model's order."""
    whole: tuple[str, ...]
    """Modules that train whole, none inside another."""


def plan_adapter(
    model: nn.Module, spec: LoraSpec, *, groups: Mapping[str, Sequence[str]], fresh: Sequence[str], skip: Sequence[str]
) -> Plan:
    """Resolve `spec` against `model`, changing neither.

    Raises:
        UnknownName: a target, pattern or module that matches nothing.
        ConfigError: an entry that matches no Linear, or a choice that this model does not allow.
    """
    names = first_names(model)
    whole = outermost([*fresh, *_saved_whole(spec, names)])
    patterns = _targets(model, spec, groups, names, whole, skip)
    ranks = _overrides("lora.rank_pattern", spec.rank_pattern, patterns)
    alphas = _overrides("lora.alpha_pattern", spec.alpha_pattern, patterns)
    layers = {
        name: LayerPlan(pattern, int(ranks.get(name, spec.r)), float(alphas.get(name, spec.alpha)))
        for name, pattern in patterns.items()
    }
    if not layers and not whole and spec.bias != "all":
        raise ConfigError("lora.targets", "[]", "nothing would train: this model has no fresh head; name layers")
    plan = Plan(layers, whole)
    check_plan(model, plan, spec)
    return plan


def check_plan(model: nn.Module, plan: Plan, spec: LoraSpec) -> None:
    """That `model` allows `plan`.

    Raises:
        ConfigError: a rank larger than its layer, a weight tied to another module, a module with state beside
            its parameters.
    """
    for name, layer in plan.layers.items():
        rows, columns = model.get_submodule(name).weight.shape  # type: ignore[misc]
        if layer.r > min(rows, columns):
            key = "lora.r" if layer.r == spec.r else "lora.rank_pattern"
            raise ConfigError(key, layer.r, f"at most {min(rows, columns)} for {name}, which is {rows} × {columns}")
    _check_ties(model, plan)
    for name in plan.whole:
        module = model.get_submodule(name)
        state = sorted(module.state_dict().keys() - dict(module.named_parameters(remove_duplicate=False)).keys())
        if state:
            raise ConfigError("lora.modules_to_save", name, f"has state that does not train ({state[0]})")


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
) -> dict[str, str]:
    """Layer → the first entry of `lora.targets` that matches it, in the model's order."""
    linears = [name for name in dict.fromkeys(names.values()) if isinstance(model.get_submodule(name), nn.Linear)]
    free = [name for name in linears if not is_inside(name, whole)]
    chosen: dict[str, str] = {}
    for entry in spec.targets:
        if entry == ALL_LINEAR:
            found = {name for name in free if not is_inside(name, skip)}
        else:
            found = _matching("lora.targets", groups.get(entry, [entry]), names)
        if not found:
            options = [*groups, ALL_LINEAR, *(_without_index(name) for name in free)]
            raise UnknownName("lora.targets", entry, options, "layer")
        if found.isdisjoint(linears):
            name = min(found)
            raise ConfigError("lora.targets", entry, f"'{name}' is a {_class(model, name)}; only Linear can be adapted")
        if found.isdisjoint(free):
            raise ConfigError("lora.targets", entry, f"'{min(found)}' trains whole already; name other layers")
        for name in free:
            if name in found:
                chosen.setdefault(name, entry)
    return {name: chosen[name] for name in free if name in chosen}


def _saved_whole(spec: LoraSpec, names: Mapping[str, str]) -> list[str]:
    saved: list[str] = []
    for entry in spec.modules_to_save:
        found = _matching("lora.modules_to_save", [entry], names)
        if not found:
            raise UnknownName("lora.modules_to_save", entry, (name.rsplit(".", 1)[-1] for name in names), "module")
        saved += sorted(found)
    return saved


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
