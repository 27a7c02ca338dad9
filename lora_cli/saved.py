"""A saved run, ready to be used: its task, its base model with the adapter in it, its labels and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.engine.device import Device, open_device
from lora_cli.errors import AdapterError, ConfigError, DataError, printable
from lora_cli.models import load_base
from lora_cli.nn import load_adapter, read_adapter, truncate
from lora_cli.prepacked import prepack
from lora_cli.process import settle_down
from lora_cli.runs.directory import RunDirectory
from lora_cli.runs.registry import find_adapter, find_run, is_bare_adapter
from lora_cli.spec import QUANTIZATIONS, ChatRun, ClassificationSpec, EvalRun, InferRun, MergeRun, ModelSpec, TaskSpec
from lora_cli.tasks import Task, build_task, load_rows
from lora_cli.tokenizer import load_tokenizer
from lora_cli.unpadded import remove_padding

if TYPE_CHECKING:
    import torch

__all__ = ["Saved", "open_saved", "task_of", "with_tokens"]


@dataclass(frozen=True)
class Saved:
    """What eval, infer and chat need of a run. `folder` is None for a bare adapter."""

    path: Path
    folder: RunDirectory | None
    task: Task
    model: torch.nn.Module
    tokenizer: Any
    decoder_start: int | None
    device: Device
    batch_size: int
    """Examples per forward pass; by default the run's own, so that its figures come out to the last digit."""
    data: Mapping[str, Any]
    """What the run saw: split → number and fingerprint of its rows."""
    quantization: str
    """How the base was kept when the adapter was trained; `model.quantization` says how it is now."""
    data_seed: int
    """What the run drew its validation rows with, where a data set brings none."""

    def first_examples(self, number: int, split: str) -> Sequence[Any]:
        """The first rows of a split of the task's data, encoded; none is read for 0."""
        if not number:
            return []
        rows = load_rows(self.task, [split], seed=self.data_seed)[split]
        return self.task.encode(rows.select(range(min(number, len(rows)))), self).examples


def open_saved(spec: EvalRun | InferRun | ChatRun | MergeRun, *, keep_padding: bool = False) -> Saved:
    """Load the run that `spec` names, with the task and base model that `spec` says (the run's own by default).

    With `keep_padding` the model is as transformers made it, without hooks (see `unpadded`, `prepacked`).

    Raises:
        RunError: it has no finished adapter.
        AdapterError: the adapter does not fit the base model, or its labels are not the task's.
    """
    path = find_run(spec.run)
    bare = is_bare_adapter(path)
    folder = None if bare else RunDirectory(path)
    if folder is not None:
        folder.check_plain()
    facts = {} if folder is None else folder.facts()
    adapter = read_adapter(find_adapter(str(path)))
    task = task_of(spec.task, facts.get("labels") or adapter.extra.get("labels"), path)
    device = open_device(spec.device)
    base = load_base(
        with_tokens(spec.model, adapter.extra.get("tokens"), path),
        **task.head,
        seed=int(facts.get("init_seed", 0)),
        dtype=device.dtype,
        device=device.device,
    )
    # Before the adapter comes in, so that what its layers share is on the device once.
    base.model.to(device.device)
    injection = load_adapter(
        base.model,
        adapter,
        fresh=base.fresh,
        fingerprint=base.fingerprint,
        force_base=spec.force_base,
    )
    if not isinstance(spec, ChatRun) and spec.lora.r is not None:
        truncate(base.model, injection, spec.lora.r)
    base.model.eval()
    # As the run did, so that its figures come out to the last digit.
    if facts.get("packing", True) and not keep_padding:
        remove_padding(base.model)
    if not keep_padding:
        # A conversation goes on; who writes once lays weights out for that.
        prepack(base.model, limit_mib=device.prepack_mib, skip=base.fresh, copies=isinstance(spec, ChatRun))
    saved_tokenizer = None if folder is None else folder.tokenizer
    tokenizer = load_tokenizer(saved_tokenizer) if saved_tokenizer and saved_tokenizer.is_dir() else base.tokenizer
    asked = spec.batch_size if isinstance(spec, EvalRun | InferRun) else None
    batch_size = asked or int(facts.get("eval_batch_size", 64))
    settle_down()
    return Saved(
        path,
        folder,
        task,
        base.model,
        tokenizer,
        base.decoder_start,
        device,
        batch_size,
        facts.get("data", {}),
        _quantization_of(adapter.extra.get("quantization", "none"), path),
        int(facts.get("data_seed", 0)),
    )


def _quantization_of(name: Any, path: Path) -> str:
    if name not in QUANTIZATIONS:
        raise AdapterError(f"{path}: quantization {printable(name, 40)}; known are {', '.join(QUANTIZATIONS)}")
    return str(name)


def with_tokens(spec: ModelSpec, tokens: Any, path: Path) -> ModelSpec:
    """The model with the tokens that the adapter was trained with, where none are named.

    Raises:
        AdapterError: it was trained with others.
    """
    if not tokens or spec.add_tokens == tokens:
        return spec
    if spec.add_tokens or not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise AdapterError(f"{path}: was trained with model.add_tokens={printable(tokens, 120)}")
    try:
        return replace(spec, add_tokens=tokens)
    except ConfigError as error:
        raise AdapterError(f"{path}: {printable(error, 180)}") from error


def task_of(spec: TaskSpec, labels: Sequence[str] | None, path: Path) -> Task:
    """The task, with the labels that the adapter was trained with.

    Raises:
        AdapterError: the labels are not the task's.
        DataError: nothing says the labels.
    """
    if not isinstance(spec, ClassificationSpec):
        return build_task(spec)
    if labels is not None and not (isinstance(labels, list) and all(isinstance(name, str) for name in labels)):
        raise AdapterError(f"{path}: its labels are {printable(labels, 60)}, not a list of texts")
    if labels and spec.labels is not None and list(spec.labels) != list(labels):
        known = printable(", ".join(labels))
        raise AdapterError(f"{path}: task.labels={printable(spec.labels, 60)}, but it was trained with {known}")
    if not labels and not spec.labels and not spec.choices and not spec.regression:
        raise DataError(path, "the adapter does not say its labels; give task.labels=[first,second,...]")
    return build_task(spec, labels)
