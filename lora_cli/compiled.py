"""A forward pass that torch.compile has made faster, given few shapes of batches. Knows the inputs of transformers'
models; nothing of tasks, adapters or training.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lora_cli.lean_imports import complete

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["Compiled", "compile_forward", "compiled_form"]

BACKEND = "inductor"
"""torch.compile's name of what makes kernels of a graph."""
_SHORTEST = 16
"""Tokens that rows are padded to at least."""
_GRAPHS = 64
"""Shapes, times training and scoring, that may be compiled; torch would give up after 8."""


class Compiled:
    """The logits of a model, compiled once for each shape of its inputs; these are padded to few shapes.

    Rows are padded to the next power of two (`longest` if that is less), and a batch to as many rows as one before it
    had. The padding is masked, and its logits are cut off. Weights are inputs of what is compiled: an adapter that is
    changed in place, or loaded, is used without compiling anything again.
    """

    def __init__(self, model: PreTrainedModel, *, pad: int, longest: int) -> None:
        import torch

        def logits(**inputs: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = model(**inputs).logits
            return found

        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, _GRAPHS)
        self._model, self._pad, self._longest = model, pad, longest
        self._plain: Callable[..., torch.Tensor] = logits
        self._run: Callable[..., torch.Tensor] | None = torch.compile(logits, dynamic=False, backend=BACKEND)
        self._most_rows = {True: 0, False: 0}

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The logits of a batch that is padded on the right. If it cannot be compiled, that is told once and from then
        on nothing is.
        """
        from torch._dynamo.exc import TorchDynamoException

        if self._run is None:
            return self._plain(**inputs)
        rows, length = inputs.get("decoder_input_ids", inputs["input_ids"]).shape
        try:
            logits = self._run(**self._in_shape(inputs))
        except TorchDynamoException as error:
            # What raised, and what it said; then comes a traceback.
            reason = " ".join(str(error).strip().splitlines()[:2])
            warnings.warn(f"device.compile: goes on uncompiled, torch.compile failed: {reason}", stacklevel=2)
            self._run = None
            return self._plain(**inputs)
        return logits[:rows, :length] if logits.ndim == 3 else logits[:rows]

    def _in_shape(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from torch.nn.functional import pad

        mode = self._model.training
        rows = self._most_rows[mode] = max(self._most_rows[mode], len(inputs["input_ids"]))
        shaped = {}
        for name, value in inputs.items():
            fill = self._pad if name.endswith("input_ids") else 0
            value = pad(value, (0, self._bucket(value.shape[1]) - value.shape[1]), value=fill)
            # Rows that repeat the first: one without any token would have attention to nothing.
            shaped[name] = value[[*range(len(value)), *[0] * (rows - len(value))]] if rows > len(value) else value
        return shaped

    def _bucket(self, length: int) -> int:
        power = max(_SHORTEST, 1 << (length - 1).bit_length())
        return max(length, min(power, self._longest))


def compile_forward(model: PreTrainedModel, *, pad: int, longest: int, is_alone: bool) -> None:
    """Have `engine.evaluate.forward` compute the logits of `model` compiled; see `Compiled`.

    A process that `is_alone` in this training lets others help it compile.

    `model` itself stays as it is, in its modules, their names and its other uses: what writes text grows by a token at
    a time, a shape each.
    """
    complete()
    if not is_alone:
        import torch._inductor.config

        torch._inductor.config.compile_threads = 1
    model.__dict__["_lora_compiled"] = Compiled(model, pad=pad, longest=longest)


def compiled_form(model: torch.nn.Module) -> Compiled | None:
    """The compiled form of `model`, if it was given one."""
    return model.__dict__.get("_lora_compiled")
