"""lora fetch: put a model and a data set where later commands find them without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_cli.sources import check_checkpoint, find_source
from lora_cli.spec import ClassificationSpec, FetchRun, ModelSpec, TaskSpec

__all__ = ["run"]


def run(spec: FetchRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> None:
    """Fetch what `spec` names and say where it is. It writes no run, so `directory` has no meaning here.

    Raises:
        UserError: something is neither here nor on the hub, or there is no network.
    """
    if spec.model is not None:
        print(f"model {spec.model.name}: {_fetch_model(spec.model)}")
    if spec.task is not None:
        print(f"task {spec.task.name}: {_fetch_data(spec.task)}")


def _fetch_model(model: ModelSpec) -> str:
    source = find_source(model)
    if source.folder is None:
        return "randomly initialised, nothing to fetch"
    check_checkpoint(source.folder, model)
    return f"{source.text}, {source.folder}"


def _fetch_data(task: TaskSpec) -> str:
    from lora_cli.tasks.splits import load_splits

    if task.data.hub is None:
        return "its data does not come from the hub, nothing to fetch"
    needed = list(dict.fromkeys(["train", task.split, *task.extra_splits]))
    label = task.label if isinstance(task, ClassificationSpec) else None
    regression = isinstance(task, ClassificationSpec) and task.regression
    rows = load_splits(task.data, needed, label=label, regression=regression, seed=0)
    return ", ".join(f"{split} {len(rows[split])} rows" for split in rows)
