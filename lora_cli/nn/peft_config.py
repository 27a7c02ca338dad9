"""PEFT's adapter_config.json: checked, key by key, without believing it. Knows no model and opens no file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_cli.errors import AdapterError, ConfigError, printable
from lora_cli.nn.targets import ALL_LINEAR
from lora_cli.spec import AdaLoraSpec, LoraSpec

__all__ = ["NO_TARGETS", "PeftConfig", "parse_config"]

NO_TARGETS = "dummy-target-modules"
"""PEFT's word for "no layer is adapted"; it refuses an empty list."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights with which the adapter fits only the base that its training changed."""

_UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "kasa_config", "layer_replication",
    "layers_pattern", "layers_to_transform", "lora_bias", "megatron_config", "monteclora_config", "target_parameters",
    "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
"""Keys that change what is computed, or where, when set; refused then."""

_HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type", "d_initial", "init_weights", "beta1", "beta2", "deltaT",
    "orth_reg_weight", "tfinal", "tinit", "total_step",
)  # fmt: skip
"""Keys without influence on a finished adapter of the layers that are supported."""

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
    token_rows: Mapping[str | None, tuple[int, ...]] = field(default_factory=dict)
    """End of a layer's name, or None for the input embedding → numbers of the rows that train in it."""
    has_projections: bool = True
    """Whether the file of a VeRA adapter holds its two random matrices; otherwise they are drawn again."""
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of an AdaLoRA adapter, layer → numbers of the ranks that its file holds, where they are not all."""


def parse_config(values: Mapping[str, Any], source: str) -> PeftConfig:
    """Check the object in an adapter_config.json; `source` is named in messages.

    Raises:
        AdapterError: a value that cannot be used, or a setting that would change what the adapter computes.
    """
    config = _Fields(values, source)
    if values.get("peft_type") not in _SPECS:
        raise config.fault("peft_type", f"{' and '.join(_SPECS)} are supported")
    for key in _UNSUPPORTED:
        if values.get(key):
            raise config.fault(key, "not supported; the adapter would compute something else")
    if str(values.get("init_lora_weights", "")).startswith(_CHANGES_BASE):
        raise config.fault("init_lora_weights", "it fits only the base that its training changed; save it converted")
    try:
        spec = _SPECS[values["peft_type"]](config)
    except (ConfigError, OverflowError) as error:
        raise AdapterError(f"{source}: {printable(error, 180)}") from error
    exclude, token_rows = tuple(config.names("exclude_modules")), config.token_rows()
    has_projections = config.get("save_projection", (bool,), True)
    kept = config.kept_ranks(spec.r) if spec.variant == "adalora" else {}
    config.warn_of_unknown()
    keys = ("task_type", "base_model_name_or_path", "revision")
    task_type, base_name, revision = (config.get(key, (str, type(None)), None) for key in keys)
    return PeftConfig(spec, exclude, task_type, base_name, revision, token_rows, has_projections, kept)


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
        if value in (ALL_LINEAR, NO_TARGETS):
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

    def kept_ranks(self, r: int) -> dict[str, tuple[int, ...]]:
        pattern: dict[str, Any] = self.get("rank_pattern", (dict, type(None)), None) or {}
        for name, mask in pattern.items():
            are_flags = isinstance(mask, list) and len(mask) == r and all(type(flag) is bool for flag in mask)
            if not name.endswith(".lora_E") or not are_flags:
                raise self.fault("rank_pattern", f"{r} times true or false are needed for each lora_E")
        names = {name.removesuffix(".lora_E"): mask for name, mask in pattern.items()}
        return {name: tuple(number for number, flag in enumerate(mask) if flag) for name, mask in names.items()}

    def token_rows(self) -> dict[str | None, tuple[int, ...]]:
        value = self.get("trainable_token_indices", (list, dict, type(None)), None) or {}
        rows: dict[str | None, list[int]] = value if isinstance(value, dict) else {None: value}
        for name, numbers in rows.items():
            are_numbers = isinstance(numbers, list) and all(type(item) is int and item >= 0 for item in numbers)
            if name == "" or not are_numbers or not numbers or len(set(numbers)) != len(numbers):
                raise self.fault(
                    "trainable_token_indices", "different token numbers are needed, or a list for each name"
                )
        return {name: tuple(numbers) for name, numbers in rows.items()}

    def warn_of_unknown(self) -> None:
        unknown = sorted(key for key in self.values.keys() - self.read if self.values[key])
        if unknown:
            names = ", ".join(printable(key, 40) for key in unknown[:5])
            warnings.warn(f"{self.source}: unknown settings are ignored: {names}", stacklevel=4)


def _lora_spec(config: _Fields) -> LoraSpec:
    return LoraSpec(
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


def _vera_spec(config: _Fields) -> LoraSpec:
    return LoraSpec(
        variant="vera",
        r=config.get("r", (int,), 256),
        dropout=float(config.get("vera_dropout", _NUMBER, 0.0)),
        bias=config.get("bias", (str,), "none").replace("vera_only", "lora_only"),
        targets=config.targets(),
        modules_to_save=config.names("modules_to_save"),
        projection_seed=config.get("projection_prng_key", (int,), 0),
    )


def _adalora_spec(config: _Fields) -> LoraSpec:
    r, target = config.get("init_r", (int,), 12), config.get("target_r", (int,), 8)
    config.get("r", (int,), 8)
    return LoraSpec(
        variant="adalora",
        r=r,
        # PEFT takes an alpha that is not positive for r.
        alpha=max(0.0, float(config.get("lora_alpha", _NUMBER, 8))) or float(r),
        dropout=float(config.get("lora_dropout", _NUMBER, 0.0)),
        bias=config.get("bias", (str,), "none"),
        targets=config.targets(),
        modules_to_save=config.names("modules_to_save"),
        adalora=AdaLoraSpec(target_r=min(r, target)),
    )


_SPECS = {"ADALORA": _adalora_spec, "LORA": _lora_spec, "VERA": _vera_spec}
"""peft_type → how its config is read."""
