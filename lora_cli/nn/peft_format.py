"""PEFT's adapter format: what its config means for a model, and how its tensors are named. Opens no file.

Read from peft 0.21: `check_target_module_exists` (layers), `_set_trainable` (modules_to_save), `get_pattern_key`
(patterns) and `get_peft_model_state_dict` (names). No regular expression of a file is ever run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_cli.errors import AdapterError, ConfigError, printable
from lora_cli.nn.layers import LoraLinear
from lora_cli.nn.targets import ALL_LINEAR, LayerPlan, Plan, first_names, is_inside, outermost
from lora_cli.nn.variants import VARIANTS
from lora_cli.spec import LoraSpec

__all__ = ["PeftConfig", "StoredTensor", "build_config", "ignored_keys", "parse_config", "plan_from", "stored_tensors"]

PREFIX = "base_model.model."
"""Before every tensor's name."""

_NO_TARGETS = "dummy-target-modules"
"""PEFT's word for "no layer is adapted"; it refuses an empty list."""

_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Task type → modules that PEFT saves whole without being asked."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights with which the adapter fits only the base that its training changed."""

_UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "kasa_config", "layer_replication",
    "layers_pattern", "layers_to_transform", "lora_bias", "megatron_config", "monteclora_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
"""Keys that change what is computed, or where, when set; refused then."""

_HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
)  # fmt: skip
"""Keys without influence on a finished adapter of Linear layers."""

_NUMBER = (int, float)
_MAX_ENTRIES = 4096
_REGEX_CHARACTERS = frozenset("^$*+?{}[]\\|()")


@dataclass(frozen=True)
class PeftConfig:
    """A checked adapter_config.json."""

    spec: LoraSpec
    """The adapter; `targets` and patterns are names or dotted ends, matched as PEFT does."""
    exclude: tuple[str, ...]
    """Names or dotted ends of layers left out."""
    task_type: str | None
    """PEFT's name of the task."""
    base_name: str | None
    """What the base model was called; a hint only."""
    revision: str | None
    """Its revision."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an adapter: where it is in the model, and in the file."""

    parameter: str
    """Name of the parameter in the adapted model."""
    keys: tuple[str, ...]
    """Its name in the file, then names that older versions gave it."""
    shape: tuple[int, ...]
    """Its shape."""


def parse_config(values: Mapping[str, Any], source: str) -> PeftConfig:
    """Check the object in an adapter_config.json; `source` is named in messages.

    Raises:
        AdapterError: a value that cannot be used, or a setting that would change what the adapter computes.
    """
    config = _Fields(values, source)
    if values.get("peft_type") != "LORA":
        raise config.fault("peft_type", "LORA is supported")
    for key in _UNSUPPORTED:
        if values.get(key):
            raise config.fault(key, "not supported; the adapter would compute something else")
    if str(values.get("init_lora_weights", "")).startswith(_CHANGES_BASE):
        raise config.fault("init_lora_weights", "it fits only the base that its training changed; save it converted")
    try:
        spec = LoraSpec(
            r=config.get("r", (int,), 8),
            alpha=float(config.get("lora_alpha", _NUMBER, 8)),
            dropout=float(config.get("lora_dropout", _NUMBER, 0.0)),
            variant="dora" if config.get("use_dora", (bool,), False) else "lora",
            scaling="alpha/sqrt(r)" if config.get("use_rslora", (bool,), False) else "alpha/r",
            bias=config.get("bias", (str,), "none"),
            targets=config.targets(),
            modules_to_save=config.names("modules_to_save"),
            rank_pattern=config.pattern("rank_pattern", (int,)),
            alpha_pattern={name: float(alpha) for name, alpha in config.pattern("alpha_pattern", _NUMBER).items()},
        )
    except (ConfigError, OverflowError) as error:
        raise AdapterError(f"{source}: {printable(error, 180)}") from error
    exclude = tuple(config.names("exclude_modules"))
    config.warn_of_unknown()
    texts = [config.get(key, (str, type(None)), None) for key in ("task_type", "base_model_name_or_path", "revision")]
    return PeftConfig(spec, exclude, *texts)


def plan_from(model: nn.Module, config: PeftConfig, fresh: Sequence[str], source: str) -> Plan:
    """The layers that PEFT would adapt and the modules it would save whole, `fresh` ones besides.

    Raises:
        AdapterError: the targets match no layer, or one that is not a Linear.
    """
    spec, names = config.spec, list(dict.fromkeys(first_names(model).values()))
    saved = (*spec.modules_to_save, *_HEADS.get(config.task_type or "", ()))
    layers: dict[str, LayerPlan] = {}
    for name in names:
        pattern = _first_match(name, spec.targets)
        if spec.targets == [ALL_LINEAR]:
            pattern = ALL_LINEAR if isinstance(model.get_submodule(name), nn.Linear) else None
        is_saved = is_inside(name, fresh) or any(f".{entry}." in f".{name}." for entry in saved)
        if pattern is None or is_saved or _first_match(name, config.exclude):
            continue
        if not isinstance(model.get_submodule(name), nn.Linear):
            kind = type(model.get_submodule(name)).__name__
            raise AdapterError(
                f"{source}: target '{printable(pattern, 60)}' is a {kind} here; only Linear is supported"
            )
        ranks, alphas = spec.rank_pattern, spec.alpha_pattern
        r = ranks.get(_first_match(name, ranks) or "", spec.r)
        layers[name] = LayerPlan(pattern, r, alphas.get(_first_match(name, alphas) or "", spec.alpha))
    if spec.targets and not layers:
        raise AdapterError(f"{source}: target_modules {printable(spec.targets, 80)} match no layer of this model")
    return Plan(layers, outermost([*fresh, *_saved_whole(names, saved, layers)]))


def stored_tensors(model: nn.Module, plan: Plan, spec: LoraSpec) -> list[StoredTensor]:
    """Every tensor that belongs in the file, for a model before or after `plan` is carried out."""
    return [*_layer_tensors(model, plan, spec), *_whole_tensors(model, plan), *_bias_tensors(model, plan, spec)]


def ignored_keys(model: nn.Module, plan: Plan) -> set[str]:
    """Second copies of the modules saved whole, which PEFT writes with bias="all" and wrote before version 0.4."""
    return {
        f"{PREFIX}{name}.{copy}.{inner}"
        for name in plan.whole
        for copy in ("original_module", "modules_to_save", "modules_to_save.default")
        for inner, _ in model.get_submodule(name).named_parameters()
    }


def build_config(model: nn.Module, plan: Plan, spec: LoraSpec, task_type: str | None) -> tuple[dict[str, Any], Plan]:
    """The adapter_config.json of an adapted model, classic keys only, and the plan that PEFT makes of it.

    That plan has more whole modules than ours where PEFT's rule, the end of a name without a dot, takes more.
    """
    names = [name for name in dict.fromkeys(first_names(model).values()) if not _is_part_of_layer(name, plan)]
    saved = (*plan.whole, *_HEADS.get(task_type or "", ()))
    whole = outermost([*plan.whole, *_saved_whole(names, saved, plan.layers)])
    targets, exclude = _shortest_names(plan.layers, names, whole)
    config: dict[str, Any] = {
        "bias": spec.bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": _plain(spec.alpha),
        "lora_dropout": spec.dropout,
        "modules_to_save": sorted(whole) or None,
        "peft_type": "LORA",
        "r": spec.r,
        "target_modules": targets or _NO_TARGETS,
        "task_type": task_type,
    }
    optional = {
        "alpha_pattern": _pattern({n: _plain(layer.alpha) for n, layer in plan.layers.items()}, _plain(spec.alpha)),
        "exclude_modules": exclude,
        "rank_pattern": _pattern({n: layer.r for n, layer in plan.layers.items()}, spec.r),
        "use_dora": spec.variant == "dora",
        "use_rslora": spec.scaling == "alpha/sqrt(r)",
    }
    config |= {key: value for key, value in optional.items() if value}
    return config, Plan(plan.layers, whole)


class _Fields:
    """Typed access to a JSON object whose author is unknown."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source
        self.read = {*_HARMLESS, *_UNSUPPORTED, "init_lora_weights"}

    def fault(self, key: str, problem: str) -> AdapterError:
        return AdapterError(f"{self.source}: {key}={printable(self.values.get(key), 60)}: {problem}")

    def get(self, key: str, types: tuple[type, ...], default: Any) -> Any:
        self.read.add(key)
        value = self.values.get(key, default)
        # Exact types: true is an int to isinstance, but no rank.
        if type(value) not in types:
            raise self.fault(key, f"a {' or '.join(kind.__name__ for kind in types)} is needed")
        return value

    def names(self, key: str) -> list[str]:
        names = self.get(key, (list, type(None)), None) or []
        if len(names) > _MAX_ENTRIES or not all(isinstance(name, str) and name for name in names):
            raise self.fault(key, f"a list of names is needed, at most {_MAX_ENTRIES}")
        return list(names)

    def targets(self) -> list[str]:
        value = self.values.get("target_modules")
        if value in (ALL_LINEAR, _NO_TARGETS):
            self.read.add("target_modules")
            return [ALL_LINEAR] if value == ALL_LINEAR else []
        if not isinstance(value, list) or not value:
            raise self.fault("target_modules", f"a list of names or {ALL_LINEAR} is needed; expressions are not run")
        return self.names("target_modules")

    def pattern(self, key: str, types: tuple[type, ...]) -> dict[str, Any]:
        pattern: dict[str, Any] = self.get(key, (dict, type(None)), None) or {}
        for name, value in pattern.items():
            if len(pattern) > _MAX_ENTRIES or not name or _REGEX_CHARACTERS & set(name):
                raise self.fault(key, "only names and their dotted ends are supported, not expressions")
            if type(value) not in types:
                raise self.fault(key, "a number is needed for each name")
        return pattern

    def warn_of_unknown(self) -> None:
        unknown = sorted(key for key in self.values.keys() - self.read if self.values[key])
        if unknown:
            names = ", ".join(printable(key, 40) for key in unknown[:5])
            warnings.warn(f"{self.source}: unknown settings are ignored: {names}", stacklevel=4)


def _ends(name: str) -> Iterator[str]:
    """The dotted ends of a name, shortest first, the name itself last."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))


def _first_match(name: str, entries: Iterable[str]) -> str | None:
    ends = set(_ends(name))
    return next((entry for entry in entries if entry in ends), None)


def _saved_whole(names: Iterable[str], saved: tuple[str, ...], layers: Mapping[str, LayerPlan]) -> list[str]:
    """Modules whose name ends with an entry, dot or no dot, unless they are or hold an adapted layer."""
    return [name for name in names if name.endswith(saved) and not any(is_inside(layer, [name]) for layer in layers)]


def _is_part_of_layer(name: str, plan: Plan) -> bool:
    return name.rpartition(".")[0] in plan.layers


def _shortest_names(
    layers: Mapping[str, LayerPlan], names: Iterable[str], whole: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Names that match the layers and nothing else, as short as possible; and what must be excluded by name."""
    others = [name for name in names if name not in layers and not is_inside(name, whole)]
    taken = {end for name in others for end in _ends(name)}
    targets = {next((end for end in _ends(name) if end not in taken), name) for name in layers}
    return sorted(targets), sorted(name for name in others if _first_match(name, targets))


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Full name → value where it is not the default, and where another entry's name would take a layer by its end."""
    own = {name for name, value in values.items() if value != default}
    taken = {name for name in values if own and _first_match(name, own)}
    # Longest first: PEFT takes the first entry that is an end of the layer's name.
    return {name: values[name] for name in sorted(own | taken, key=lambda name: (-len(name), name))}


def _plain(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha


def _layer_tensors(model: nn.Module, plan: Plan, spec: LoraSpec) -> Iterator[StoredTensor]:
    for name, layer in plan.layers.items():
        base = _base(model, name)
        shapes = {"A": (layer.r, base.in_features), "B": (base.out_features, layer.r)}
        for factor, shape in shapes.items():
            key = f"{PREFIX}{name}.lora_{factor}"
            yield StoredTensor(f"{name}.{factor}", (f"{key}.weight", f"{key}.default.weight"), shape)
        for parameter in VARIANTS[spec.variant].parameters:
            key = f"{PREFIX}{name}.lora_{parameter}_vector"
            yield StoredTensor(f"{name}.{parameter}", (key, f"{key}.weight", f"{key}.default"), (base.out_features,))


def _whole_tensors(model: nn.Module, plan: Plan) -> Iterator[StoredTensor]:
    for name in plan.whole:
        for inner, parameter in model.get_submodule(name).named_parameters():
            places = ("", "modules_to_save.", "modules_to_save.default.")
            keys = tuple(f"{PREFIX}{name}.{place}{inner}" for place in places)
            yield StoredTensor(f"{name}.{inner}", keys, tuple(parameter.shape))


def _bias_tensors(model: nn.Module, plan: Plan, spec: LoraSpec) -> Iterator[StoredTensor]:
    for name in plan.layers if spec.bias != "none" else ():
        bias = _base(model, name).bias
        if bias is not None:
            keys = (f"{PREFIX}{name}.base_layer.bias", f"{PREFIX}{name}.bias")
            yield StoredTensor(f"{name}.base_layer.bias", keys, tuple(bias.shape))
    for name, parameter in model.named_parameters() if spec.bias == "all" else ():
        if f".{name}".endswith(".bias") and not is_inside(name, [*plan.layers, *plan.whole]):
            yield StoredTensor(name, (PREFIX + name,), tuple(parameter.shape))


def _base(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    base = module.base_layer if isinstance(module, LoraLinear) else module
    assert isinstance(base, nn.Linear)
    return base
