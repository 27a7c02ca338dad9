"""PEFT's adapter format: what its config means for a model, and what is written into it. Opens no file.

Read from peft 0.21: `check_target_module_exists` (layers), `_set_trainable` (modules_to_save) and `get_pattern_key`
(patterns). No regular expression of a file is ever run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import mode
from typing import Any

from torch import nn

from lora_cli.errors import AdapterError, printable
from lora_cli.nn.kinds import kind_of
from lora_cli.nn.layers import LoraConv1D
from lora_cli.nn.peft_config import NO_TARGETS, PeftConfig
from lora_cli.nn.peft_tensors import base_of, stored_scale
from lora_cli.nn.quantized import LoraQuantizedLinear
from lora_cli.nn.targets import ALL_LINEAR, LayerPlan, Plan, first_names, is_inside, outermost
from lora_cli.nn.tokens import vocabulary_layers
from lora_cli.nn.vera import widest
from lora_cli.spec import LoraSpec

__all__ = ["build_config", "plan_from"]

_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Task type → modules that PEFT saves whole without being asked."""


def plan_from(model: nn.Module, config: PeftConfig, fresh: Sequence[str], source: str) -> Plan:
    """The layers that PEFT would adapt and the modules it would save whole, `fresh` ones besides.

    Raises:
        AdapterError: the targets match no layer, or one of a kind that is not supported.
    """
    spec, names = config.spec, list(dict.fromkeys(first_names(model).values()))
    saved = (*spec.modules_to_save, *_HEADS.get(config.task_type or "", ()))
    layers: dict[str, LayerPlan] = {}
    matched: list[str] = []
    for name in names:
        pattern = _first_match(name, spec.targets)
        kind = kind_of(model.get_submodule(name))
        if spec.targets == [ALL_LINEAR]:
            pattern = ALL_LINEAR if kind and kind.is_projection and not _is_output(model, name) else None
        is_saved = is_inside(name, fresh) or any(f".{entry}." in f".{name}." for entry in saved)
        if pattern is None or _first_match(name, config.exclude):
            continue
        matched += [name] if kind and kind.is_projection else []
        if is_saved:
            continue
        if kind is None:
            found = type(model.get_submodule(name)).__name__
            raise AdapterError(f"{source}: target '{printable(pattern, 60)}' is a {found} here, which is not supported")
        ranks, alphas = spec.rank_pattern, spec.alpha_pattern
        r = ranks.get(_first_match(name, ranks) or "", spec.r)
        alpha = alphas.get(_first_match(name, alphas) or "", spec.alpha)
        layers[name] = LayerPlan(pattern, r, alpha, kept=config.kept.get(name))
    if spec.targets and not layers:
        raise AdapterError(f"{source}: target_modules {printable(spec.targets, 80)} match no layer of this model")
    if not config.has_projections and widest(model, matched) != widest(model, layers):
        raise AdapterError(f"{source}: save_projection=false: PEFT drew the matrices for wider layers; save them")
    whole = outermost([*fresh, *_saved_whole(names, saved, layers)])
    return Plan(layers, whole, new_rows=_new_rows(model, config, source))


def _new_rows(model: nn.Module, config: PeftConfig, source: str) -> dict[str, tuple[int, ...]]:
    """Embedding or output layer → its rows that train, where PEFT would put them; a shared weight has them once."""
    layers = vocabulary_layers(model) if config.token_rows else {}
    found: dict[str, tuple[int, ...]] = {}
    for entry, index in config.token_rows.items():
        matching = (name for name, names in layers.items() if entry is None or any(n.endswith(entry) for n in names))
        first = next(matching, None)
        if first is None:
            named = printable(entry or "the input embedding", 60)
            raise AdapterError(f"{source}: trainable_token_indices: {named} is no embedding of tokens here")
        num_rows = len(base_of(model, first).get_parameter("weight"))
        if max(index) >= num_rows:
            lacks = f"it brings a row for token {max(index)}, but {first} has {num_rows} rows"
            raise AdapterError(f"{source}: {lacks}; name the tokens that were added: model.add_tokens=[...]")
        if found.setdefault(first, index) != index:
            raise AdapterError(f"{source}: trainable_token_indices: two lists for {first}")
    return found


def build_config(model: nn.Module, plan: Plan, spec: LoraSpec, task_type: str | None) -> tuple[dict[str, Any], Plan]:
    """The adapter_config.json of an adapted model, classic keys only, and the plan that PEFT makes of it.

    That plan has more whole modules than ours where PEFT's rule, the end of a name without a dot, takes more.
    """
    names = [name for name in dict.fromkeys(first_names(model).values()) if not _is_part_of_layer(name, plan)]
    saved = (*plan.whole, *_HEADS.get(task_type or "", ()))
    whole = outermost([*plan.whole, *_saved_whole(names, saved, plan.layers)])
    is_vera = spec.variant == "vera"
    # VeRA's matrices are as wide as the widest layer that matches, be it saved whole.
    targets, exclude = _shortest_names(plan.layers, names, () if is_vera else whole)
    scales = {name: stored_scale(layer, spec.scaling) for name, layer in plan.layers.items()}
    ranks = {name: r for name, (r, _) in scales.items()}
    alphas = {name: _plain(alpha) for name, (_, alpha) in scales.items()}
    r, alpha = mode([*ranks.values()] or [spec.r]), mode([*alphas.values()] or [_plain(spec.alpha)])
    config: dict[str, Any] = {
        "bias": spec.bias,
        "fan_in_fan_out": any(_has_in_first(model.get_submodule(name)) for name in plan.layers),
        "inference_mode": True,
        "modules_to_save": sorted(whole) or None,
        "r": r,
        "target_modules": targets or NO_TARGETS,
        "task_type": task_type,
    }
    own_plan = Plan(plan.layers, whole, new_rows=plan.new_rows)
    if is_vera:
        return config | _vera_config(spec, exclude), own_plan
    config |= {"lora_alpha": alpha, "lora_dropout": spec.dropout, "peft_type": "LORA"}
    if spec.variant == "adalora":
        del config["r"]
        config |= {"peft_type": "ADALORA", "init_r": spec.r, "target_r": spec.adalora.target_r, "total_step": 1}
    optional = {
        "alpha_pattern": _pattern(alphas, alpha),
        "exclude_modules": exclude,
        "rank_pattern": _pattern(ranks, r),
        "use_dora": spec.variant == "dora",
        "trainable_token_indices": {name: list(index) for name, index in plan.new_rows.items()},
        "use_rslora": spec.scaling == "alpha/sqrt(r)",
    }
    config |= {key: value for key, value in optional.items() if value}
    return config, own_plan


def _vera_config(spec: LoraSpec, exclude: Sequence[str]) -> dict[str, Any]:
    if exclude:
        raise AdapterError(f"{printable(exclude[0], 60)}: its name ends in an adapted layer's; PEFT's VeRA takes both")
    return {
        "bias": spec.bias.replace("lora_only", "vera_only"),
        "peft_type": "VERA",
        "projection_prng_key": spec.projection_seed,
        "save_projection": True,
        "vera_dropout": spec.dropout,
    }


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


def _has_in_first(layer: nn.Module) -> bool:
    """Whether PEFT finds a Conv1D there, whose weight is (in, out)."""
    if isinstance(layer, LoraQuantizedLinear):
        return layer.quantized.is_transposed
    return isinstance(layer, LoraConv1D)


def _is_output(model: nn.Module, name: str) -> bool:
    """Whether it is the output embedding, which PEFT does not count among all-linear."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return output is model.get_submodule(name)
