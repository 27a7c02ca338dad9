"""Layers that keep their input alone for the backward pass, and are computed again there. Knows transformers' layers;
nothing of tasks, adapters or training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lora_cli.dropout import replayed
from lora_cli.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["checkpoint_layers", "checkpointed", "forgo_cache", "layers_of"]


def checkpoint_layers(model: nn.Module, family: str) -> None:
    """Compute each layer of `model`, which keeps no cache (`forgo_cache`), once more in the backward pass, instead of
    keeping what is inside it.

    It draws the dropout that it drew, so losses and gradients are the same to the last bit; an encoder-decoder's
    gradients up to rounding, as what its decoder's layers ask of the encoder is summed layer by layer.

    Raises:
        ConfigError: the family's layers cannot be told apart.
    """
    for layer in layers_of(model, family, key="train.checkpointing"):
        # What transformers calls where a layer is to be computed again.
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, checkpointed  # type: ignore[assignment]


def layers_of(model: nn.Module, family: str, *, key: str) -> list[nn.Module]:
    """The layers that run one after the other.

    Raises:
        ConfigError: the family has fewer than it runs, so that `key` cannot be true.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(key, "true", f"not with {family}, whose layers cannot be told apart")
    return layers


def forgo_cache(model: nn.Module) -> None:
    """Let `model` keep no keys and values unless it is asked to: nothing is generated in training, where they would
    be copied for nothing, and a layer that is computed again would find in a cache what it put there.
    """
    # An encoder-decoder's two stacks each have a config of their own.
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "use_cache"):
            config.use_cache = False


def checkpointed(compute: Callable[..., Any], *args: Any) -> Any:
    """What `compute` makes of `args`; it is called again in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    return checkpoint(compute, *args, use_reentrant=False, context_fn=replayed)
