"""Adapters in a model: put in, merged, taken out, collected for the optimizer. Knows no file and no command.

`inject` changes a model in place, `merge` and `unmerge` its base weights, `remove` undoes `inject`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.errors import AdapterError, ConfigError
from lora_cli.nn.dylora import DrawnRank
from lora_cli.nn.embeddings import LoraEmbedding
from lora_cli.nn.fused import placement_of
from lora_cli.nn.kinds import kind_of, shape_of
from lora_cli.nn.layers import LoraLayer, generator_for
from lora_cli.nn.quantized import quantized_layers
from lora_cli.nn.targets import FULL, LayerPlan, Plan, first_names, is_inside, plan_adapter
from lora_cli.nn.tokens import TokenRows, token_layers, vocabulary_layers
from lora_cli.nn.variants import VARIANTS
from lora_cli.nn.vera import draw_pair, widest
from lora_cli.spec import LoraSpec

__all__ = [
    "Injection",
    "TargetRow",
    "adapted_layers",
    "check_truncation",
    "inject",
    "inject_plan",
    "load_trainable_state",
    "merge",
    "parameter_groups",
    "remove",
    "trainable_state",
    "truncate",
    "unmerge",
]


@dataclass(frozen=True)
class TargetRow:
    """What one entry of `lora.targets` matched."""

    pattern: str
    """The entry; "new tokens" for their rows, "everything" in full fine-tuning."""
    modules: tuple[str, ...]
    """Names of the adapted layers, in the model's order; in full fine-tuning the model's largest parts."""
    ranks: tuple[int, ...]
    """Their ranks, in the same order; of each part, where parts of a fused projection are adapted."""
    num_parameters: int
    """Trained parameters in them."""


@dataclass(frozen=True)
class Injection:
    """What was done to a model."""

    spec: LoraSpec
    """The settings it was done by."""
    rows: tuple[TargetRow, ...]
    """Adapted layers by the entry that chose them."""
    trained_whole: tuple[str, ...]
    """Modules that train whole: the fresh head and `lora.modules_to_save`."""
    num_trainable: int
    """Parameters that train."""
    num_adapter: int
    """Of these, parameters of the adapters."""
    num_total: int
    """Parameters of the model, adapters included."""
    left_out: tuple[str, ...] = ()
    """Ends of the names of matrices that an entry such as all-linear covers, but that are not adapted: the output
    embedding, experts in one parameter, their router."""


def inject(
    model: nn.Module,
    spec: LoraSpec,
    *,
    groups: Mapping[str, Sequence[str]],
    fresh: Sequence[str] = (),
    skip: Sequence[str] = (),
    new_rows: Sequence[int] = (),
    seed: int = 0,
) -> Injection:
    """Adapt `model` in place; whatever `spec` does not train is frozen. On an error the model is untouched.

    With variant "full" no layer is adapted and every parameter trains.

    `groups` gives names such as "default" their dotted suffixes; "all-linear" is built in. `fresh` names the
    modules without pretrained weights: they train whole. `skip` is what "all-linear" leaves out besides: the
    output embedding. Layers inside a module that trains whole are never adapted. `new_rows` are the numbers of
    tokens whose rows train in the input embedding and in the output layer, from where they stand. Trained tensors
    become fp32, so a base in a narrower dtype has to run under autocast. With `lora.init=eva`, `start_from_inputs` is
    to follow.

    Raises:
        UnknownName: a target, pattern or module that matches nothing.
        ConfigError: an entry that matches no layer of a kind that can be adapted, or a choice that this model
            does not allow.
        AdapterError: the model is adapted already.
    """
    plan = plan_adapter(model, spec, groups=groups, fresh=fresh, skip=skip, new_rows=new_rows)
    return inject_plan(model, plan, spec, seed=seed)


def inject_plan(model: nn.Module, plan: Plan, spec: LoraSpec, *, seed: int = 0) -> Injection:
    """`inject` with the layers already chosen; of `spec`, targets and patterns are not read."""
    if adapted_layers(model) or token_layers(model):
        raise AdapterError("the model is adapted already; remove that adapter first")
    model.requires_grad_(spec.variant == FULL)
    shared = _shared_pair(model, plan, spec)
    layers = {name: _adapt(model, name, layer, spec, seed, shared) for name, layer in plan.layers.items()}
    for quantized in quantized_layers(model):
        quantized.original = None
    if spec.variant == "dylora":
        drawn = DrawnRank(model, spec.r)
        for layer in layers.values():
            layer.drawn_rank = drawn
    for name, first in first_names(model).items():
        if first in layers:
            model.set_submodule(name, layers[first].train(model.training))
    _put_rows(model, plan.new_rows)
    for parameter in _trained_base_parameters(model, plan.whole, spec.bias):
        parameter.requires_grad_(True)
    _widen_trained(model)
    return _injection(model, plan, spec)


def _put_rows(model: nn.Module, new_rows: Mapping[str, Sequence[int]]) -> None:
    layers = vocabulary_layers(model) if new_rows else {}
    for name, index in new_rows.items():
        owner = None
        for each in layers[name]:
            layer = TokenRows(model.get_submodule(each), index, owner).train(model.training)
            owner = owner or layer
            model.set_submodule(each, layer)


def _shared_pair(model: nn.Module, plan: Plan, spec: LoraSpec) -> tuple[nn.Parameter, nn.Parameter] | None:
    """The one A and B of all layers, for a variant that has it."""
    if not plan.layers or not VARIANTS[spec.variant].is_shared:
        return None
    device = next(model.parameters()).device
    return draw_pair(spec.r, *widest(model, plan.layers), seed=spec.projection_seed, device=device)


def _adapt(
    model: nn.Module,
    name: str,
    layer: LayerPlan,
    spec: LoraSpec,
    seed: int,
    shared: tuple[nn.Parameter, nn.Parameter] | None,
) -> LoraLayer:
    base = model.get_submodule(name)
    kind = kind_of(base)
    assert kind is not None, "a plan holds what can be adapted"
    return kind(
        base,
        r=layer.r,
        alpha=layer.alpha,
        scaling=spec.scaling,
        dropout=spec.dropout,
        variant=spec.variant,
        init=spec.init,
        placement=placement_of(model, name, layer.parts, shape_of(model, name)[0]) if layer.parts else None,
        generator=generator_for(seed, name),
        shared=shared,
    )


def adapted_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Module name → adapted layer, in the model's order; a shared layer is named once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def merge(model: nn.Module) -> dict[str, float]:
    """Write every update and every new token's row into its base weight. Returns layer → largest change of a weight.

    Computed in fp32 and rounded once. Copies of the base weights are kept for `unmerge`.

    Raises:
        AdapterError: merged already, or a merged weight is not finite; no layer is merged then.
    """
    layers = _mergeable(model)
    changes: dict[str, float] = {}
    for name, layer in layers.items():
        try:
            changes[name] = layer.merge()
        except AdapterError as error:
            for done in changes:
                layers[done].unmerge()
            raise AdapterError(f"{name}: {error}") from error
    return changes


def unmerge(model: nn.Module) -> None:
    """Put every base weight back, bit for bit.

    Raises:
        AdapterError: a layer is not merged.
    """
    for layer in _mergeable(model).values():
        layer.unmerge()


def remove(model: nn.Module) -> None:
    """Put plain modules back in place of the adapted ones. A merged update stays in them; any other is lost."""
    layers = adapted_layers(model)
    for layer in layers.values():
        if layer.drawn_rank:
            layer.drawn_rank.stop()
    for name, first in first_names(model).items():
        if first in layers:
            model.set_submodule(name, layers[first].base_layer)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, TokenRows):
            model.set_submodule(name, module.base_layer)


def truncate(model: nn.Module, injection: Injection, r: int) -> None:
    """Leave the first `r` ranks of a DyLoRA adapter, in place: what was trained at rank `r`.

    Raises:
        ConfigError: it was trained otherwise, so its first ranks mean nothing, or at fewer ranks.
    """
    check_truncation(injection.spec, r)
    for layer in adapted_layers(model).values():
        layer.truncate(r)


def check_truncation(spec: LoraSpec, r: int) -> None:
    """That an adapter of this kind has a rank `r` inside.

    Raises:
        ConfigError: see `truncate`.
    """
    if spec.variant != "dylora":
        hint = "lora inspect shows what a smaller rank would keep, lora combine makes it"
        raise ConfigError("lora.r", r, f"only for an adapter trained with lora=dylora; {hint}")
    if r > spec.r:
        raise ConfigError("lora.r", r, f"at most {spec.r}, the rank that was trained")


def _mergeable(model: nn.Module) -> dict[str, LoraLayer | TokenRows]:
    return {**adapted_layers(model), **token_layers(model)}


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name → a copy of every parameter that trains, on its device."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trainable_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what `trainable_state` returned back into `model`.

    Raises:
        AdapterError: a name too many or too few, or another shape; the model is untouched.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    differing = sorted(parameters.keys() ^ state.keys())
    if differing:
        lack = "is missing" if differing[0] in parameters else "is not trained here"
        raise AdapterError(f"trained state: {differing[0]} {lack} ({len(differing)} names differ)")
    for name, parameter in parameters.items():
        if parameter.shape != state[name].shape:
            have, want = list(state[name].shape), list(parameter.shape)
            raise AdapterError(f"trained state: {name} has shape {have}, this model needs {want}")
    for name, parameter in parameters.items():
        parameter.copy_(state[name])


def parameter_groups(
    model: nn.Module, injection: Injection, *, lr: float, head_lr: float | None, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimizer: {head, rest, B} × {decayed, not}, without the empty ones; "names" lists their names.

    Biases, norms and magnitudes (one dimension) are not decayed. `head_lr` is for modules that train whole. B learns
    `lora.b_lr_ratio` times as fast as A (LoRA+, Hayou et al. 2024, arXiv:2402.12354): A sums over all inputs, so its
    rate has to fall with their number, B's has not. In an embedding A is looked up, a sum of one term, whichever factor
    is zero at the start: both keep `lr`.
    """
    ratio = injection.spec.b_lr_ratio
    fast = _fast_parameters(model) if ratio != 1 else set()
    groups: dict[tuple[bool, bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_head, is_decayed, is_fast = is_inside(name, injection.trained_whole), parameter.ndim > 1, name in fast
        rates = {
            "lr": head_lr if is_head and head_lr is not None else lr * (ratio if is_fast else 1),
            "weight_decay": weight_decay if is_decayed else 0.0,
        }
        group = groups.setdefault((is_head, is_fast, is_decayed), {"params": [], "names": [], **rates})
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def _fast_parameters(model: nn.Module) -> set[str]:
    """Names of every B that LoRA+ is about."""
    return {f"{name}.B" for name, layer in adapted_layers(model).items() if not isinstance(layer, LoraEmbedding)}


def _trained_base_parameters(model: nn.Module, whole: Sequence[str], bias: str) -> Iterator[nn.Parameter]:
    for name in whole:
        yield from model.get_submodule(name).parameters()
    if bias == "lora_only":
        yield from (layer.bias for layer in adapted_layers(model).values() if layer.bias is not None)
    elif bias == "all":
        yield from (p for name, p in model.named_parameters() if f".{name}".endswith(".bias"))


def _widen_trained(model: nn.Module) -> None:
    """Make what trains fp32, and with it the rest of a norm, which needs all its parameters in one dtype."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if any(p.requires_grad for p in own):
            for parameter in own:
                if parameter.requires_grad or not kind_of(module):
                    parameter.data = parameter.data.float()


def _injection(model: nn.Module, plan: Plan, spec: LoraSpec) -> Injection:
    sizes = {name: _num_adapter(layer) for name, layer in adapted_layers(model).items()}
    rows = []
    for pattern in dict.fromkeys(layer.pattern for layer in plan.layers.values()):
        modules = tuple(name for name, layer in plan.layers.items() if layer.pattern == pattern)
        ranks = tuple(plan.layers[name].r for name in modules)
        rows.append(TargetRow(pattern, modules, ranks, sum(sizes[name] for name in modules)))
    tokens = {name: layer.new_rows.numel() for name, layer in token_layers(model).items()}
    if tokens:
        rows.append(TargetRow("new tokens", tuple(tokens), (), sum(tokens.values())))
    if spec.variant == FULL:
        rows.append(_everything_else(model, plan.whole))
    return Injection(
        spec=spec,
        rows=tuple(rows),
        trained_whole=plan.whole,
        num_trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        num_adapter=sum(sizes.values()) + sum(tokens.values()),
        num_total=sum(p.numel() for p in model.parameters()) + sum(q.num_weights for q in quantized_layers(model)),
        left_out=plan.left_out,
    )


def _everything_else(model: nn.Module, heads: Sequence[str]) -> TargetRow:
    """What full fine-tuning trains besides the fresh head; a tied weight counts once."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if not is_inside(name, heads)}
    modules = tuple(name for name, _ in model.named_children() if any(is_inside(own, [name]) for own in sizes))
    return TargetRow("everything", modules, (), sum(sizes.values()))


def _num_adapter(layer: LoraLayer) -> int:
    variant = VARIANTS[layer.variant]
    names = {"A", "B", *variant.parameters} - {*variant.frozen}
    return sum(layer.get_parameter(name).numel() for name in names)
