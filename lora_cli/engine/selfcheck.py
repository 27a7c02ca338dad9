"""What must hold in every training, checked in milliseconds while it runs. A failure is an error, not a warning."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lora_cli.errors import TrainingFailure
from lora_cli.nn import quantized_layers

__all__ = ["Movement", "check_same_logits", "same_logits"]


class Movement:
    """Watches which tensors a model's first steps change: all that train, none that are frozen."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        # A tensor's version counts its in-place changes: exact, and free of a copy of the base model.
        self._frozen = {n: tensor._version for n, tensor in _frozen(model).items()}

    def verify(self, *, still: Iterable[str] = ()) -> None:
        """Compare with now. `still` are endings of names that may not have moved yet (A, after one step from B=0).

        Raises:
            TrainingFailure: a trained tensor is where it was, or a frozen one is not.
        """
        parameters = dict(self._model.named_parameters())
        stuck = [
            name
            for name, before in self._trained.items()
            if not name.endswith(tuple(still)) and torch.equal(before, parameters[name].detach())
        ]
        frozen = _frozen(self._model)
        moved = [name for name, version in self._frozen.items() if frozen[name]._version != version]
        if stuck:
            hint = "a tiny train.lr does that too"
            raise TrainingFailure(
                f"self-check: {_some(stuck)} should train but did not move in the first steps; {hint}"
            )
        if moved:
            raise TrainingFailure(f"self-check: {_some(moved)} is frozen but changed in the first steps")


def check_same_logits(what: str, expected: torch.Tensor, found: torch.Tensor, *, tolerance: float) -> None:
    """Require two batches of logits to agree within `tolerance` (absolute, and relative to the largest).

    Raises:
        TrainingFailure: they do not; `what` says which promise is broken.
    """
    if not same_logits(expected, found, tolerance=tolerance):
        difference = (expected.float() - found.float()).abs().max().item()
        raise TrainingFailure(f"self-check: {what}; the largest difference of the logits is {difference:.3g}")


def same_logits(expected: torch.Tensor, found: torch.Tensor, *, tolerance: float) -> bool:
    """Whether two batches of logits agree within `tolerance` (absolute, and relative to the largest)."""
    difference = (expected.float() - found.float()).abs().max().item()
    return difference <= tolerance * max(1.0, expected.float().abs().max().item())


def _frozen(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What must not change: parameters that do not train, and what quantised layers keep of theirs."""
    kept = {id(tensor) for layer in quantized_layers(model) for tensor in layer.buffers()}
    buffers = {name: tensor for name, tensor in model.named_buffers() if id(tensor) in kept}
    return {name: p for name, p in model.named_parameters() if not p.requires_grad} | buffers


def _some(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
