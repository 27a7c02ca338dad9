"""What trains in a model with loralib's layers, and what is saved of it. Knows names of parameters, opens no file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.errors import UnknownName
from lora_cli.nn.loralib.layers import ConvLoRA, LoRALayer

__all__ = ["lora_state_dict", "mark_only_lora_as_trainable", "merged_state_dict"]

_BIASES = ("none", "all", "lora_only")


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze every parameter that is no factor: whose own name does not start with lora_.

    `bias`: "all" leaves biases trainable, "lora_only" those of layers with factors.

    Raises:
        UnknownName: another word for `bias`.
    """
    chosen = _chosen(model, bias)
    for name, parameter in model.named_parameters():
        if name in chosen and not _is_factor(name):
            parameter.requires_grad = True
        elif name not in chosen:
            parameter.requires_grad = False


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """The part of `model.state_dict()` that `mark_only_lora_as_trainable` leaves trainable; load with strict=False.

    Raises:
        UnknownName: another word for `bias`.
    """
    chosen = _chosen(model, bias)
    return {name: tensor for name, tensor in model.state_dict().items() if name in chosen}


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of the same model made of torch's own layers: updates added to the weights in fp32, rounded once."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not _is_factor(name)}
    for name, layer in _lora_layers(model).items():
        prefix = f"{name}." if name else ""
        if isinstance(layer, ConvLoRA):
            state |= {f"{prefix}{own}": state.pop(f"{prefix}conv.{own}") for own in layer.conv.state_dict()}
        weight = state[f"{prefix}weight"]
        if layer.has_factors:
            state[f"{prefix}weight"] = (weight.float() + layer.delta_weight().float()).to(weight.dtype)
    return state


def _is_factor(name: str) -> bool:
    return name.rpartition(".")[2].startswith("lora_")


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    return {
        name: module for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, LoRALayer)
    }


def _chosen(model: nn.Module, bias: str) -> set[str]:
    """Names in the state of the model of what trains."""
    if bias not in _BIASES:
        raise UnknownName("bias", bias, _BIASES, "choice")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    chosen = {name for name in names if _is_factor(name)}
    if bias == "all":
        chosen |= {name for name in names if "bias" in name.rpartition(".")[2]}
    if bias == "lora_only":
        for name, layer in _lora_layers(model).items():
            inner = "conv.bias" if isinstance(layer, ConvLoRA) else "bias"
            chosen |= {f"{name}.{inner}" if name else inner} & set(names) if layer.has_factors else set()
    return chosen
