"""What a GPU has no room for waits in the host's memory: activations until the backward pass, frozen layers until their
turn. Knows tensors, modules and devices; not which device there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.checkpointing import checkpointed

__all__ = ["Streamed", "move_whole", "saved_on_host"]

_SMALL = 1 << 16
"""Bytes up to which a tensor is not worth its way."""


@contextmanager
def saved_on_host(device: torch.device) -> Iterator[None]:
    """Within it, what the backward pass will need is moved off `device`, all but weights, and fetched when it is."""
    with torch.autograd.graph.saved_tensors_hooks(partial(_put_away, device), partial(_fetched, device)):
        yield


def _put_away(device: torch.device, tensor: Tensor) -> Tensor:
    is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
    if is_weight or tensor.device != device or tensor.nbytes <= _SMALL:
        return tensor
    kept = torch.empty(tensor.size(), dtype=tensor.dtype, pin_memory=device.type != "cpu")
    return kept.copy_(tensor)


def _fetched(device: torch.device, tensor: Tensor) -> Tensor:
    return tensor if tensor.device == device else tensor.to(device, non_blocking=True)


class Streamed:
    """Layers whose frozen weights stay on the host: each has them on `device` while it is computed, and again while it
    is computed anew in the backward pass. What trains, and what is outside of layers, is on `device` all the time.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], device: torch.device) -> None:
        self._model, self._layers, self._device = model, layers, device
        for layer in layers:
            layer.forward = partial(self._computed, layer, layer.forward)
        self.place()

    @torch.no_grad()
    def place(self) -> None:
        """Move what belongs on the device there, and the rest off it; after layers were put in, loaded or frozen."""
        inside = {id(tensor) for layer in self._layers for _, _, tensor in _places(layer)}
        for table, name, tensor in _places(self._model):
            stays = id(tensor) in inside and not _trains(tensor)
            _move(table, name, torch.device("cpu") if stays else self._device)

    def _computed(self, layer: nn.Module, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def with_weights(*inputs: Any) -> Any:
            with self._fetched(layer):
                return compute(*inputs, **kwargs)

        # Kept for the backward pass, what is fetched would stay.
        return checkpointed(with_weights, *args) if torch.is_grad_enabled() else with_weights(*args)

    @contextmanager
    def _fetched(self, layer: nn.Module) -> Iterator[None]:
        """Within it, copies on the device stand where a layer's frozen tensors are."""
        own = [place for place in _places(layer) if not _trains(place[2])]
        try:
            for table, name, tensor in own:
                copy = tensor.detach().to(self._device, non_blocking=True, copy=True)
                table[name] = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
            yield
        finally:
            for table, name, tensor in own:
                table[name] = tensor


@torch.no_grad()
def move_whole(model: nn.Module, device: torch.device) -> None:
    """Move what is not split over processes to `device`; what is waits where `World.share_out` has put it."""
    from torch.distributed.tensor import DTensor

    for table, name, tensor in _places(model):
        if not isinstance(tensor, DTensor):
            _move(table, name, device)


def _move(table: dict[str, Any], name: str, device: torch.device) -> None:
    """Have the tensor of this name on `device`; a parameter stays the object that it is."""
    moved = table[name].to(device)
    if isinstance(table[name], nn.Parameter):
        table[name].data = moved
    else:
        table[name] = moved


def _places(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Each tensor in `module`, where it stands and what it is called there."""
    tables: list[dict[str, Any]] = [table for each in module.modules() for table in (each._parameters, each._buffers)]
    return [(table, name, tensor) for table in tables for name, tensor in table.items() if tensor is not None]


def _trains(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad
