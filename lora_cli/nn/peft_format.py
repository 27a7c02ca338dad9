"""PEFT's adapter format: what its config means for a model, and how its tensors are named. Opens no file.

Read from peft 0.21: `check_target_module_exists` (layers), `_set_trainable` (modules_to_save), `get_pattern_key`
(patterns) and `get_peft_model_state_dict` (names). No regular expression of a file is ever run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mode
from typing import Any

from torch import Tensor, nn

from lora_cli.errors import AdapterError, printable
from lora_cli.nn.adalora import KeptRanks
from lora_cli.nn.convolutions import Kernel, LoraConvolution, kernels_of
from lora_cli.nn.fused import Placement, placement_of
from lora_cli.nn.inits import INITS
from lora_cli.nn.kinds import kind_of, shape_of
from lora_cli.nn.layers import LoraConv1D, LoraEmbedding, LoraLayer
from lora_cli.nn.peft_config import NO_TARGETS, PeftConfig
from lora_cli.nn.quantized import LoraQuantizedLinear
from lora_cli.nn.targets import ALL_LINEAR, FULL, LayerPlan, Plan, first_names, is_inside, outermost
from lora_cli.nn.tokens import TokenRows, vocabulary_layers
from lora_cli.nn.variants import VARIANTS
from lora_cli.nn.vera import widest
from lora_cli.spec import LoraSpec

__all__ = [
    "PREFIX",
    "StoredTensor",
    "build_config",
    "ignored_keys",
    "plan_from",
    "plan_of",
    "stored_scale",
    "stored_tensors",
    "without_projections",
]

PREFIX = "base_model.model."
"""Before every tensor's name."""

_PROJECTION = "base_model.vera_"
"""Before the names of the two matrices that all layers of a VeRA adapter share."""

_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Task type → modules that PEFT saves whole without being asked."""

_EMBEDDINGS = ("embed_tokens", "lm_head")
"""Layers with these names PEFT saves together with their base weight, which is not read."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an adapter: where it is in the model, and in the file."""

    parameter: str
    """Name of the parameter in the adapted model."""
    keys: tuple[str, ...]
    """Its name in the file, then names that older versions gave it."""
    shape: tuple[int, ...]
    """Its shape in the file."""
    layout: Placement | Kernel | KeptRanks | None = field(default=None, compare=False)
    """For a B of parts: where its blocks stand among the rows of zeros in the file; for a convolution: its kernels."""

    def packed(self, parameter: Tensor) -> Tensor:
        """The parameter as it stands in the file."""
        return parameter if self.layout is None else self.layout.spread(parameter)

    def unpacked(self, tensor: Tensor) -> Tensor:
        """The tensor in the file as it stands in the model.

        Raises:
            AdapterError: it is not zero outside of the parts or groups that it is said to be of.
        """
        if self.layout is None:
            return tensor
        blocks = self.layout.gather(tensor)
        if blocks.count_nonzero() != tensor.count_nonzero():
            raise AdapterError(f"{printable(self.parameter, 90)} {self.layout.outside}")
        return blocks


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
        num_rows = len(_base(model, first).get_parameter("weight"))
        if max(index) >= num_rows:
            lacks = f"it brings a row for token {max(index)}, but {first} has {num_rows} rows"
            raise AdapterError(f"{source}: {lacks}; name the tokens that were added: model.add_tokens=[...]")
        if found.setdefault(first, index) != index:
            raise AdapterError(f"{source}: trainable_token_indices: two lists for {first}")
    return found


def without_projections(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """What is in the file of a VeRA adapter whose random matrices are drawn again."""
    return [stored for stored in tensors if not stored.keys[0].startswith(_PROJECTION)]


def stored_tensors(model: nn.Module, plan: Plan, spec: LoraSpec) -> list[StoredTensor]:
    """Every tensor that belongs in the file, for a model before or after `plan` is carried out.

    In full fine-tuning, which PEFT does not know, they have the model's own names.
    """
    if spec.variant == FULL:
        return [StoredTensor(name, (name,), tuple(p.shape)) for name, p in model.named_parameters()]
    return [
        *_TENSORS.get(spec.variant, _layer_tensors)(model, plan, spec),
        *_row_tensors(model, plan),
        *_whole_tensors(model, plan),
        *_bias_tensors(model, plan, spec),
    ]


def ignored_keys(model: nn.Module, plan: Plan) -> set[str]:
    """What PEFT writes and we do not need.

    Second copies of the modules saved whole (with bias="all", and before version 0.4), and base weights of embeddings
    that are targeted or have new rows.
    """
    embeddings = {f"{PREFIX}{name}.base_layer.weight" for name in plan.layers if name.endswith(_EMBEDDINGS)}
    embeddings |= {
        f"{PREFIX}{each}.token_adapter.base_layer.weight"
        for name in plan.new_rows
        for each in vocabulary_layers(model)[name]
    }
    return embeddings | {
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


def plan_of(layer: LoraLayer, scaling: str) -> LayerPlan:
    """What `layer` is in a file: with a residual init, of twice the rank and the same scaling."""
    if not INITS[layer.init].is_residual:
        return LayerPlan("", layer.r, layer.alpha, layer.parts)
    return LayerPlan("", 2 * layer.r, layer.alpha * (2 if scaling == "alpha/r" else math.sqrt(2)), layer.parts)


def stored_scale(layer: LayerPlan, scaling: str) -> tuple[int, float]:
    """(r, alpha) in PEFT's file. k parts are one update of rank k·r there, whose alpha keeps the scaling as it is."""
    k = max(1, len(layer.parts))
    return k * layer.r, layer.alpha * (k if scaling == "alpha/r" else math.sqrt(k))


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
        base, (rows, columns) = _base(model, name), shape_of(model, name)
        r, _ = stored_scale(layer, spec.scaling)
        placement = placement_of(model, name, layer.parts, rows) if layer.parts else None
        kernels = kernels_of(base, r) if LoraConvolution.fits(base) else {}
        for factor, shape, placed in (("A", (r, columns), None), ("B", (rows, r), placement)):
            key = f"{PREFIX}{name}.lora_{factor}"
            keys = (f"{key}.weight", f"{key}.default.weight")
            if LoraEmbedding.fits(base):
                key = f"{PREFIX}{name}.lora_embedding_{factor}"
                keys = (key, f"{key}.default")
            yield _shaped(StoredTensor(f"{name}.{factor}", keys, shape, placed), kernels.get(factor))
        for parameter in VARIANTS[spec.variant].parameters:
            key = f"{PREFIX}{name}.lora_{parameter}_vector"
            names = (key, f"{key}.weight", f"{key}.default")
            yield _shaped(StoredTensor(f"{name}.{parameter}", names, (rows,)), kernels.get(parameter))


def _vera_tensors(model: nn.Module, plan: Plan, spec: LoraSpec) -> Iterator[StoredTensor]:
    """Of each layer its vectors; of the first one A and B, as all have the same."""
    for name in plan.layers:
        sizes = {"lambda_b": shape_of(model, name)[0], "lambda_d": spec.r}
        for parameter, size in sizes.items():
            yield StoredTensor(f"{name}.{parameter}", (f"{PREFIX}{name}.vera_{parameter}",), (size,))
    for name in list(plan.layers)[:1]:
        rows, columns = widest(model, plan.layers)
        for factor, shape in {"A": (spec.r, columns), "B": (rows, spec.r)}.items():
            key = f"{_PROJECTION}{factor}"
            yield StoredTensor(f"{name}.{factor}", (key, f"{key}.default"), shape)


def _adalora_tensors(model: nn.Module, plan: Plan, spec: LoraSpec) -> Iterator[StoredTensor]:
    for name, layer in plan.layers.items():
        rows, columns = shape_of(model, name)
        kept = tuple(range(layer.r)) if layer.kept is None else layer.kept
        layouts = {
            "A": KeptRanks((layer.r, columns), kept, 0),
            "B": KeptRanks((rows, layer.r), kept, 1),
            "E": KeptRanks((layer.r,), kept, 0, is_column=True),
        }
        for factor, layout in layouts.items():
            key = f"{PREFIX}{name}.lora_{factor}"
            yield StoredTensor(f"{name}.{factor}", (key, f"{key}.default"), layout.shape, layout)


_TENSORS = {"vera": _vera_tensors, "adalora": _adalora_tensors}
"""Variant → the tensors of its layers, where they are others than LoRA's."""


def _shaped(stored: StoredTensor, kernel: Kernel | None) -> StoredTensor:
    return stored if kernel is None else replace(stored, shape=kernel.shape, layout=kernel)


def _row_tensors(model: nn.Module, plan: Plan) -> Iterator[StoredTensor]:
    for name, index in plan.new_rows.items():
        key = f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"
        columns = _base(model, name).get_parameter("weight").shape[1]
        yield StoredTensor(f"{name}.new_rows", (key, f"{key}.default"), (len(index), columns))


def _whole_tensors(model: nn.Module, plan: Plan) -> Iterator[StoredTensor]:
    for name in plan.whole:
        for inner, parameter in model.get_submodule(name).named_parameters():
            places = ("", "modules_to_save.", "modules_to_save.default.")
            keys = tuple(f"{PREFIX}{name}.{place}{inner}" for place in places)
            yield StoredTensor(f"{name}.{inner}", keys, tuple(parameter.shape))


def _bias_tensors(model: nn.Module, plan: Plan, spec: LoraSpec) -> Iterator[StoredTensor]:
    for name in plan.layers if spec.bias != "none" else ():
        bias = getattr(_base(model, name), "bias", None)
        if bias is not None:
            keys = (f"{PREFIX}{name}.base_layer.bias", f"{PREFIX}{name}.bias")
            yield StoredTensor(f"{name}.base_layer.bias", keys, tuple(bias.shape))
    for name, parameter in model.named_parameters() if spec.bias == "all" else ():
        if f".{name}".endswith(".bias") and not is_inside(name, [*plan.layers, *plan.whole]):
            yield StoredTensor(name, (PREFIX + name,), tuple(parameter.shape))


def _has_in_first(layer: nn.Module) -> bool:
    """Whether PEFT finds a Conv1D there, whose weight is (in, out)."""
    if isinstance(layer, LoraQuantizedLinear):
        return layer.quantized.is_transposed
    return isinstance(layer, LoraConv1D)


def _base(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    return module.base_layer if isinstance(module, LoraLayer | TokenRows) else module


def _is_output(model: nn.Module, name: str) -> bool:
    """Whether it is the output embedding, which PEFT does not count among all-linear."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return output is model.get_submodule(name)
