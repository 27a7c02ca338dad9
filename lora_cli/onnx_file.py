"""A model as an ONNX file, and what onnxruntime computes with it. Knows torch's exporter; nothing of adapters or runs.

The packages are those of the extra `onnx`, imported only here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from lora_cli.errors import ConfigError, ModelError
from lora_cli.lean_imports import complete
from lora_cli.tokenizer import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["INPUTS", "OnnxModel", "check_packages", "save_onnx"]

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""What a model may take, (batch, length) and int64 each; a tokenizer says which of them it gives."""

_AXES = {0: "batch", 1: "length"}
_EXAMPLE = (2, 8)
"""Shape that the model is traced with. An axis of 1 would be taken for one that never changes."""


def check_packages() -> None:
    """Refuse to begin without the packages.

    Raises:
        ConfigError: it says how to install them.
    """
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        raise ConfigError("target", "onnx", "needs packages: pip install 'lora-cli[onnx]'")


def save_onnx(model: PreTrainedModel, file: Path, *, inputs: Sequence[str]) -> None:
    """Write what `model` computes: `inputs` (batch, length), both sizes free, to `logits`.

    Weights of more than 2 GB lie beside the file, as `<name>.data`. `model` must not be one that computes without
    padding (see `unpadded`), whose path through a batch depends on the batch.

    Raises:
        ModelError: torch's exporter cannot follow this model.
    """
    complete()
    # A tensor each: one that stands for two inputs makes one input of them.
    example = tuple(torch.ones(_EXAMPLE, dtype=torch.int64) for _ in inputs)
    with _silence():
        try:
            program = torch.onnx.export(
                _Logits(model, inputs).eval(),
                example,
                input_names=list(inputs),
                output_names=["logits"],
                dynamic_shapes=((_AXES,) * len(inputs),),
                dynamo=True,
                # onnxruntime does it when it loads the file, and in less time.
                optimize=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ModelError(f"target=onnx: torch cannot export {model.config.model_type}: {_cause(error)}") from error
        assert program is not None
        # Where in the source each operation comes from: half of a small file, with paths of this machine.
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()
        program.save(str(file))


class OnnxModel(torch.nn.Module):
    """An ONNX file in the place of a model: tensors on the CPU in, an object with `logits` out."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session: Any = onnxruntime.InferenceSession(
            str(file), sess_options=options, providers=["CPUExecutionProvider"]
        )
        self._inputs = [each.name for each in self._session.get_inputs()]

    def forward(self, **batch: torch.Tensor) -> SimpleNamespace:
        """Logits (batch, labels) or (batch, length, vocabulary); whatever is no input of the file is left aside."""
        (logits,) = self._session.run(["logits"], {name: batch[name].numpy() for name in self._inputs})
        return SimpleNamespace(logits=torch.from_numpy(logits))


class _Logits(torch.nn.Module):
    """A model that takes its inputs in order and returns logits alone."""

    def __init__(self, model: PreTrainedModel, inputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.inputs = model, tuple(inputs)

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(**dict(zip(self.inputs, values, strict=True))).logits
        return logits


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's notes on what it does from the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with quiet():
            yield
    finally:
        logging.disable(level)


def _cause(error: BaseException) -> str:
    """The first line of what the exporter's own error came from."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    return next(iter(str(first).splitlines()), type(first).__name__)[:160]
