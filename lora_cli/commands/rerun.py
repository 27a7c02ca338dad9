"""lora rerun: a run's folder in, the same run made again beside it, and what differs between the two."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from lora_cli.commands import resume, train
from lora_cli.config import read_train_run
from lora_cli.errors import RunError
from lora_cli.runs.difference import differing_versions, first_difference, read_metrics
from lora_cli.runs.directory import RunDirectory, read_saved_config
from lora_cli.runs.registry import find_run
from lora_cli.screen import Screen, significant
from lora_cli.spec import ProlongSpec, RerunRun, ResumeRun, TrustSpec
from lora_cli.tasks import build_task
from lora_cli.trackers import check_tracker

__all__ = ["run"]


def run(spec: RerunRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> float | None:
    """Make the run that `spec` names again, in `directory` or a new folder under runs/; returns the primary metric.

    Raises:
        UserError: there is no finished run of that name, or it cannot be made again here.
        TrainingFailure: the training cannot go on; its checkpoints stay.
    """
    started, screen, old = time.perf_counter(), Screen(), RunDirectory(find_run(spec.run))
    old.check_plain()
    facts = old.facts()
    if facts["status"] != "finished":
        raise RunError(f"{old.path}: is {facts['status']}, not finished; lora resume finishes a run")
    begun = read_train_run(read_saved_config(old.path), trusted=spec.model.trust_remote_code)
    begun = replace(begun, device=spec.device or begun.device, resume="never")
    check_tracker(begun.tracker)
    if directory is not None:
        RunDirectory.check_free(directory)
    task, words = build_task(begun.task), old.overrides()
    new, metrics = train.make(begun, task, screen, directory=directory, overrides=words, started=started)
    if extended := facts.get("extended"):
        _prolong(new, extended, spec.model)
        metrics = new.facts()["metrics"]
    screen.show(_beside(facts["metrics"], metrics))
    screen.line(f"\n{_differences(old, new)}\n{new.path}")
    return metrics.get(begun.task.split, {}).get(begun.task.metrics[0])


def _prolong(new: RunDirectory, extended: Sequence[Mapping[str, Any]], trust: TrustSpec) -> None:
    """What was asked for of the first run after its end."""
    for change in extended:
        if new.facts()["steps"] != change["step"]:
            raise RunError(
                f"{new.path}: the first run was prolonged at step {change['step']}, before its end; this was not"
            )
        resume.run(ResumeRun(run=str(new.path), train=ProlongSpec(**resume.goals_of(change)), model=trust))


def _beside(recorded: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for name in ("metric", "first run", "this run", ""):
        table.add_column(name, justify="left" if name in ("metric", "") else "right")
    for split, metrics in recorded.items():
        for name, was in metrics.items():
            found = now.get(split, {}).get(name)
            same = "equal" if found == was else "differs"
            table.add_row(escape(f"{split}/{name}"), significant(was, 6), significant(found, 6), same)
    return table


def _differences(old: RunDirectory, new: RunDirectory) -> str:
    """A line each on the training, the adapter, and the versions."""
    part = first_difference(read_metrics(new.path), read_metrics(old.path))
    theirs = {file.name: file.read_bytes() for file in old.adapter.glob("*.safetensors")}
    equal = theirs == {file.name: file.read_bytes() for file in new.adapter.glob("*.safetensors")}
    versions = differing_versions(new.facts(), old.facts())
    return "\n".join(
        [
            f"training   {part or 'equal to the last bit at every step'}",
            f"adapter    {'equal' if equal else 'differs'}, byte by byte",
            f"versions   {', '.join(versions) or 'equal, and the device too'}",
        ]
    )
