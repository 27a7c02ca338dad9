"""What is learnt: rows, examples, losses, metrics. Knows nothing of models, run folders or Hydra."""

from __future__ import annotations

from collections.abc import Sequence

from lora_cli.errors import ConfigError, UnknownName
from lora_cli.spec import ClassificationSpec, TaskSpec
from lora_cli.tasks.classification import Classification
from lora_cli.tasks.encoding import Encoded
from lora_cli.tasks.rows import Rows, overlap, repeats
from lora_cli.tasks.scoring import Scorer
from lora_cli.tasks.splits import load_splits

__all__ = ["KINDS", "Classification", "Encoded", "Rows", "Scorer", "build_task", "load_splits", "overlap", "repeats"]

KINDS = {"classification": Classification}
"""Name of a kind, as in task.kind → its class."""


def build_task(spec: TaskSpec, labels: Sequence[str] | None = None) -> Classification:
    """The task that `spec` describes; `labels` are those of a run, and go before the spec's.

    Raises:
        UnknownName: no such kind.
    """
    if spec.kind not in KINDS:
        raise UnknownName("task.kind", spec.kind, KINDS, "kind of task")
    if not isinstance(spec, ClassificationSpec):
        line = f"defaults: [/schema/task/{spec.kind}@_here_, _self_]"
        raise ConfigError("task", spec.name, f"its file has to begin with {line}")
    return KINDS[spec.kind](spec, labels=labels)
