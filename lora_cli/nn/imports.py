"""Adapters of other libraries by PEFT's names: loralib's and torchtune's tensors, mapped and reported, never guessed.

Knows names and shapes, and of the model what its modules are called; opens no file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lora_cli.errors import AdapterError, ConfigError, listed, printable
from lora_cli.nn.embeddings import LoraEmbedding
from lora_cli.nn.kinds import kind_of
from lora_cli.nn.layers import LoraConv1D
from lora_cli.nn.peft_tensors import PREFIX
from lora_cli.nn.stored import Factors, StoredAdapter

__all__ = ["Mapped", "format_of", "from_loralib", "from_torchtune"]

_LORALIB = re.compile(r"(.+)\.lora_([AB])")
_TORCHTUNE = re.compile(r"(.+)\.(lora_a|lora_b|magnitude)(?:\.weight)?")
_NAMES = {
    r"layers\.(\d+)\.attn\.(q|k|v)_proj": r"model.layers.\1.self_attn.\2_proj",
    r"layers\.(\d+)\.attn\.output_proj": r"model.layers.\1.self_attn.o_proj",
    r"layers\.(\d+)\.mlp\.w1": r"model.layers.\1.mlp.gate_proj",
    r"layers\.(\d+)\.mlp\.w2": r"model.layers.\1.mlp.down_proj",
    r"layers\.(\d+)\.mlp\.w3": r"model.layers.\1.mlp.up_proj",
    r"output": "lm_head",
}
"""torchtune's name of a layer → transformers' name (torchtune/models/convert_weights.py)."""
_LETTERS = {"A": "A", "B": "B", "lora_a": "A", "lora_b": "B", "magnitude": "magnitude"}
_ROTATED = ("llama", "mistral")
"""Families in which torchtune turns the query's and key's outputs into another order."""


@dataclass(frozen=True)
class Mapped:
    """An adapter of another library, and where each of its tensors came from."""

    stored: StoredAdapter
    """As it would stand in PEFT's files."""
    report: tuple[tuple[str, str, tuple[int, ...]], ...]
    """(name in the source, name of the tensor here, its shape in the source)."""


@dataclass
class _Layer:
    """One layer's tensors as the source has them."""

    names: dict[str, str] = field(default_factory=dict)
    """A, B or magnitude → name in the source."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """A, B or magnitude → tensor."""


def format_of(names: Sequence[str]) -> str:
    """Which library gives its tensors such names: peft, loralib or torchtune.

    Raises:
        AdapterError: none of them.
    """
    if any(name.startswith(PREFIX) for name in names):
        return "peft"
    for library, pattern in (("loralib", _LORALIB), ("torchtune", _TORCHTUNE)):
        if any(pattern.fullmatch(name) for name in names):
            return library
    raise AdapterError(f"no names of PEFT, loralib or torchtune among these: {listed(sorted(names), 120)}")


def from_loralib(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    *,
    alpha: float,
    enable_lora: Sequence[bool] = (),
    modules_to_save: Sequence[str] = (),
) -> Mapped:
    """What `loralib.lora_state_dict` returned, by the model's own names of its layers.

    `alpha` is loralib's lora_alpha, `enable_lora` what its MergedLinear was given; the file says neither.
    Tensors of `modules_to_save` and biases are taken as they are.

    Raises:
        AdapterError: a name that the model does not have, a convolution, or a tensor that is none of these.
        ConfigError: a MergedLinear that `enable_lora` does not fit.
    """
    found, rest = _layers_of(tensors, _LORALIB)
    layers = {}
    for name, layer in found.items():
        A, B, rows = layer.tensors["A"], layer.tensors["B"], _num_outputs(model, name)
        k = 1
        if len(A) != B.shape[1] or len(B) != rows:
            k, B = _spread(name, A, B, rows, enable_lora)
        # loralib scales each of the k blocks by alpha / r, and r is len(A) / k.
        layers[name] = Factors(A, B, alpha * k / len(A), LoraEmbedding.fits(model.get_submodule(name)))
    others = {}
    for name in rest:
        module, _, parameter = name.rpartition(".")
        if not any(f".{saved}." in f".{module}." for saved in modules_to_save) and parameter != "bias":
            raise AdapterError(
                f"{printable(name, 90)} is no factor and no bias; modules_to_save=[{printable(module, 60)}] takes it "
                "as a module trained whole"
            )
        _check_shape(model, name, tensors[name])
        others[f"{module}.base_layer.bias" if module in layers else name] = name
    return _mapped(found, {name: name for name in found}, layers, {}, tensors, others, modules_to_save, model)


def from_torchtune(tensors: Mapping[str, Tensor], model: nn.Module, *, alpha: float) -> Mapped:
    """What torchtune's recipes save as adapter_model.pt, for Llama and Mistral.

    Rows of B of query and key are put into transformers' order (torchtune's `tune_to_peft_adapter_weights`).

    Raises:
        AdapterError: another family, a layer that the model does not have, or a tensor that is no factor.
    """
    settings: Any = getattr(model, "config", None)
    family = getattr(settings, "model_type", "a model without config")
    if family not in _ROTATED:
        known = " and ".join(_ROTATED)
        raise AdapterError(f"torchtune's order of outputs is known for {known} only, not for {printable(family, 40)}")
    found, rest = _layers_of(tensors, _TORCHTUNE)
    if rest:
        raise AdapterError(f"{printable(rest[0], 90)} is no factor of torchtune's LoRA ({len(rest)} such tensors)")
    heads = {"q_proj": settings.num_attention_heads, "k_proj": settings.num_key_value_heads}
    names, layers, magnitudes = {}, {}, {}
    for source, layer in found.items():
        name = names[source] = _renamed(source)
        turned = {key: t if key == "A" else _unrotated(t, heads.get(source[-6:])) for key, t in layer.tensors.items()}
        if len(turned["B"]) != _num_outputs(model, name):
            raise AdapterError(f"{printable(source, 90)}: {len(turned['B'])} outputs, not those of {name}")
        layers[name] = Factors(turned["A"], turned["B"], alpha / len(turned["A"]))
        if "magnitude" in turned:
            magnitudes[name] = turned["magnitude"]
    return _mapped(found, names, layers, magnitudes, tensors, {}, (), model)


def _layers_of(tensors: Mapping[str, Tensor], pattern: re.Pattern[str]) -> tuple[dict[str, _Layer], list[str]]:
    """Layer in the source → its tensors, with factors that fit; and the names of all other tensors."""
    layers: dict[str, _Layer] = {}
    rest = []
    for name, tensor in tensors.items():
        if not (match := pattern.fullmatch(name)):
            rest.append(name)
            continue
        layer, letter = layers.setdefault(match[1], _Layer()), _LETTERS[match[2]]
        layer.names[letter], layer.tensors[letter] = name, tensor
    for name, layer in layers.items():
        factors = [layer.tensors.get(letter) for letter in "AB"]
        if any(factor is None or factor.ndim != 2 or 0 in factor.shape for factor in factors):
            raise AdapterError(f"{printable(name, 90)}: two matrices A and B are needed")
    return layers, rest


def _spread(name: str, A: Tensor, B: Tensor, rows: int, enable_lora: Sequence[bool]) -> tuple[int, Tensor]:
    """k, and the one B (out, k·r) for the stacked A that computes what loralib's MergedLinear does."""
    r, n, chosen = B.shape[1], len(enable_lora), [place for place, on in enumerate(enable_lora) if on]
    k = len(chosen)
    if not k or rows % n or tuple(A.shape[:1]) != (k * r,) or len(B) != rows // n * k:
        shapes = f"A {list(A.shape)} and B {list(B.shape)} for {rows} outputs"
        raise ConfigError("enable_lora", list(enable_lora), f"does not fit {printable(name, 60)}: {shapes}")
    result = B.new_zeros(n, rows // n, k, r)
    for number, place in enumerate(chosen):
        result[place, :, number] = B.chunk(k)[number]
    return k, result.view(rows, k * r)


def _unrotated(tensor: Tensor, num_heads: int | None) -> Tensor:
    """(out, ...) with each head's outputs in halves, as transformers has them, not in pairs."""
    if num_heads is None:
        return tensor
    if len(tensor) % (2 * num_heads):
        raise AdapterError(f"{len(tensor)} outputs do not fit {num_heads} heads")
    return tensor.view(num_heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _renamed(source: str) -> str:
    for pattern, name in _NAMES.items():
        if match := re.fullmatch(pattern, source):
            return match.expand(name)
    raise AdapterError(f"{printable(source, 90)} is no layer that torchtune adapts in Llama or Mistral")


def _num_outputs(model: nn.Module, name: str) -> int:
    """Outputs of the layer called so, if it is of a kind that can be taken over exactly."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise AdapterError(
            f"{printable(name, 90)}: no layer of this model; is model= the one it was trained on?"
        ) from None
    kind = kind_of(module)
    if kind is None or not (kind.is_projection or isinstance(module, nn.Embedding)):
        raise AdapterError(
            f"{printable(name, 90)} is a {type(module).__name__}; only linear layers and embeddings mean the same there"
        )
    return kind.shape_of(module)[0]


def _check_shape(model: nn.Module, name: str, tensor: Tensor) -> None:
    own = dict(model.named_parameters()).get(name)
    if own is None or own.shape != tensor.shape:
        has = "no such parameter" if own is None else f"shape {list(own.shape)} there"
        raise AdapterError(f"{printable(name, 90)}: {list(tensor.shape)} in the file, the model has {has}")


def _mapped(
    found: Mapping[str, _Layer],
    names: Mapping[str, str],
    layers: Mapping[str, Factors],
    magnitudes: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    others: Mapping[str, str],
    modules_to_save: Sequence[str],
    model: nn.Module,
) -> Mapped:
    """`others` gives each further tensor's name here the one in the source."""
    biases = [
        key for key in others if key.endswith(".bias") and not any(f".{m}." in f".{key}" for m in modules_to_save)
    ]
    bias = "none" if not biases else "all" if any(".base_layer." not in key for key in biases) else "lora_only"
    config = {
        "bias": bias,
        "fan_in_fan_out": any(LoraConv1D.fits(model.get_submodule(name)) for name in layers),
        "inference_mode": True,
        "modules_to_save": sorted(modules_to_save) or None,
        "peft_type": "LORA",
        "target_modules": sorted(layers),
        "use_dora": bool(magnitudes),
    }
    kept = {PREFIX + key: tensors[source] for key, source in others.items()}
    stored = StoredAdapter(config, {}, dict(magnitudes), kept).with_layers(layers)
    report = [
        (source, f"{names[name]}.{letter}", tuple(layer.tensors[letter].shape))
        for name, layer in found.items()
        for letter, source in layer.names.items()
    ]
    report += [(source, key, tuple(tensors[source].shape)) for key, source in others.items()]
    return Mapped(stored, tuple(report))
