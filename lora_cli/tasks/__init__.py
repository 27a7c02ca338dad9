"""What is learnt: rows, examples, losses, metrics. Knows nothing of models, run folders or Hydra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from lora_cli.errors import ConfigError, UnknownName
from lora_cli.spec import TASK_KINDS, TaskSpec
from lora_cli.tasks.chat import Chat
from lora_cli.tasks.classification import Classification
from lora_cli.tasks.encoding import Encoded, Reader
from lora_cli.tasks.generation import Generation, TextTask
from lora_cli.tasks.language_modeling import LanguageModeling
from lora_cli.tasks.rows import Rows, overlap, repeats
from lora_cli.tasks.scoring import Scorer
from lora_cli.tasks.sequences import EncodedTexts, Query
from lora_cli.tasks.splits import load_splits
from lora_cli.tasks.text_scoring import TextScorer

__all__ = [
    "KINDS",
    "Classification",
    "Encoded",
    "EncodedTexts",
    "Query",
    "Reader",
    "Rows",
    "Scorer",
    "Task",
    "TextScorer",
    "TextTask",
    "build_task",
    "load_rows",
    "load_splits",
    "overlap",
    "repeats",
]

Task: TypeAlias = Classification | Generation | Chat | LanguageModeling

KINDS: dict[str, Callable[[Any], Task]] = {
    "classification": Classification,
    "generation": Generation,
    "chat": Chat,
    "language_modeling": LanguageModeling,
}
"""Name of a kind, as in task.kind → its class."""


def load_rows(task: Task, splits: Sequence[str], *, seed: int) -> dict[str, Rows]:
    """The `splits` of a task's data; see `load_splits`."""
    return load_splits(task.spec.data, splits, label=task.label, regression=task.regression, seed=seed)


def build_task(spec: TaskSpec, labels: Sequence[str] | None = None) -> Task:
    """The task that `spec` describes; `labels` are those of a run, and go before the spec's.

    Raises:
        UnknownName: no such kind.
    """
    if spec.kind not in KINDS:
        raise UnknownName("task.kind", spec.kind, KINDS, "kind of task")
    if not isinstance(spec, TASK_KINDS[spec.kind]):
        line = f"defaults: [/schema/task/{spec.kind}@_here_, _self_]"
        raise ConfigError("task", spec.name, f"its file has to begin with {line}")
    if spec.kind == "classification":
        return Classification(spec, labels=labels)  # type: ignore[arg-type]
    return KINDS[spec.kind](spec)
