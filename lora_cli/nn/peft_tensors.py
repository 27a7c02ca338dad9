"""PEFT's names and shapes of an adapter's tensors. Opens no file.

Read from peft 0.21: `get_peft_model_state_dict`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from lora_cli.errors import AdapterError, printable
from lora_cli.nn.adalora import KeptRanks
from lora_cli.nn.convolutions import Kernel, LoraConvolution, kernels_of
from lora_cli.nn.embeddings import LoraEmbedding
from lora_cli.nn.fused import Placement, placement_of
from lora_cli.nn.inits import INITS
from lora_cli.nn.kinds import shape_of
from lora_cli.nn.layers import LoraLayer
from lora_cli.nn.targets import FULL, LayerPlan, Plan, is_inside
from lora_cli.nn.tokens import TokenRows, vocabulary_layers
from lora_cli.nn.variants import VARIANTS
from lora_cli.nn.vera import widest
from lora_cli.spec import LoraSpec

__all__ = [
    "PREFIX",
    "StoredTensor",
    "base_of",
    "ignored_keys",
    "plan_of",
    "stored_scale",
    "stored_tensors",
    "without_projections",
]

PREFIX = "base_model.model."
"""Before every tensor's name."""

_PROJECTION = "base_model.vera_"
"""Before the names of the two matrices that all layers of a VeRA adapter share."""

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


def plan_of(layer: LoraLayer, scaling: str) -> LayerPlan:
    """What `layer` is in a file: with a residual init, of twice the rank and the same scaling."""
    if not INITS[layer.init].is_residual:
        return LayerPlan("", layer.r, layer.alpha, layer.parts)
    return LayerPlan("", 2 * layer.r, layer.alpha * (2 if scaling == "alpha/r" else math.sqrt(2)), layer.parts)


def stored_scale(layer: LayerPlan, scaling: str) -> tuple[int, float]:
    """(r, alpha) in PEFT's file. k parts are one update of rank k·r there, whose alpha keeps the scaling as it is."""
    k = max(1, len(layer.parts))
    return k * layer.r, layer.alpha * (k if scaling == "alpha/r" else math.sqrt(k))


def base_of(model: nn.Module, name: str) -> nn.Module:
    """A module, or what it was before it was adapted."""
    module = model.get_submodule(name)
    return module.base_layer if isinstance(module, LoraLayer | TokenRows) else module


def _layer_tensors(model: nn.Module, plan: Plan, spec: LoraSpec) -> Iterator[StoredTensor]:
    for name, layer in plan.layers.items():
        base, (rows, columns) = base_of(model, name), shape_of(model, name)
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
        columns = base_of(model, name).get_parameter("weight").shape[1]
        yield StoredTensor(f"{name}.new_rows", (key, f"{key}.default"), (len(index), columns))


def _whole_tensors(model: nn.Module, plan: Plan) -> Iterator[StoredTensor]:
    for name in plan.whole:
        for inner, parameter in model.get_submodule(name).named_parameters():
            places = ("", "modules_to_save.", "modules_to_save.default.")
            keys = tuple(f"{PREFIX}{name}.{place}{inner}" for place in places)
            yield StoredTensor(f"{name}.{inner}", keys, tuple(parameter.shape))


def _bias_tensors(model: nn.Module, plan: Plan, spec: LoraSpec) -> Iterator[StoredTensor]:
    for name in plan.layers if spec.bias != "none" else ():
        bias = getattr(base_of(model, name), "bias", None)
        if bias is not None:
            keys = (f"{PREFIX}{name}.base_layer.bias", f"{PREFIX}{name}.bias")
            yield StoredTensor(f"{name}.base_layer.bias", keys, tuple(bias.shape))
    for name, parameter in model.named_parameters() if spec.bias == "all" else ():
        if f".{name}".endswith(".bias") and not is_inside(name, [*plan.layers, *plan.whole]):
            yield StoredTensor(name, (PREFIX + name,), tuple(parameter.shape))
