"""lora resume: a run's own folder in, the same run finished out; prolonged, if more steps are asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli import ranks
from lora_cli.commands import train
from lora_cli.config import read_train_run
from lora_cli.errors import ConfigError
from lora_cli.runs.directory import read_saved_config
from lora_cli.runs.registry import find_started
from lora_cli.runs.starts import pinned
from lora_cli.screen import Screen
from lora_cli.spec import ProlongSpec, ResumeRun, TrainRun
from lora_cli.tasks import build_task
from lora_cli.trackers import check_tracker

if TYPE_CHECKING:
    from lora_cli.engine.checkpoint import Progress
    from lora_cli.experiment import Experiment

__all__ = ["as_extended", "goals_of", "run"]

_GOALS = ("max_steps", "epochs", "patience")
"""Keys of train.* that say when a training ends; they may grow."""


def run(spec: ResumeRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> float | None:
    """Finish the run that `spec` names, prolonged if it says so; returns the primary metric of the scored split.

    Raises:
        UserError: it cannot go on, or not with these changes; nothing is written then.
        TrainingFailure: the training cannot go on; its checkpoints stay.
    """
    started, screen = time.perf_counter(), Screen()
    folder = find_started(spec.run)
    folder.check_plain()
    facts = folder.facts()
    begun = read_train_run(read_saved_config(folder.path), trusted=spec.model.trust_remote_code)
    before = as_extended(begun, facts.get("extended", []))
    goals = _grown(spec.train, before)
    if facts["status"] == "finished" and not goals:
        return train.report(screen, folder, facts["metrics"], before)
    goal = pinned(_changed(before, spec))
    check_tracker(goal.tracker)
    with ranks.beside(goal, train.follow):
        from lora_cli.engine.micro_step import alone

        task = build_task(goal.task)
        experiment = train.prepare(goal, task, train.load_splits(goal, task, screen), screen)
        with folder.held():
            checkpoint = train.newest_checkpoint(experiment, folder)
            changes: dict[str, Any] = {}
            if goals:
                progress = checkpoint.progress if checkpoint else None
                screen.fact("prolongs", _prolonged(experiment, before, progress))
                since = {"step": progress.step if progress else 0, **goals}
                changes = {"extended": [*facts.get("extended", []), since]}
            words = folder.overrides()
            metrics = alone(train.completing)(
                experiment, folder, checkpoint, screen, overrides=words, started=started, **changes
            )
    return train.report(screen, folder, metrics, goal)


def as_extended(spec: TrainRun, extended: Sequence[Mapping[str, Any]]) -> TrainRun:
    """What a run is trained by that was begun with `spec` and prolonged since."""
    for change in extended:
        spec = replace(spec, train=replace(spec.train, **goals_of(change)))
    return spec


def goals_of(change: Mapping[str, Any]) -> dict[str, Any]:
    """The ends that one entry of `extended` in run.json asked for."""
    return {name: change[name] for name in _GOALS if change.get(name) is not None}


def _grown(asked: ProlongSpec, before: TrainRun) -> dict[str, Any]:
    """The ends that are to come later than before.

    Raises:
        ConfigError: one would come earlier, or has no say.
    """
    known = asdict(before.train)
    goals = {name: value for name, value in asdict(asked).items() if name in _GOALS and value is not None}
    goals = {name: value for name, value in goals.items() if value != known[name]}
    for name, value in goals.items():
        if known[name] is not None and value < known[name]:
            raise ConfigError(f"train.{name}", value, f"the run has {known[name]}; more can be asked for, not less")
        if name == "patience" and known[name] is None:
            raise ConfigError("train.patience", value, "the run has none, and would end earlier with it")
        if name == "epochs" and known["max_steps"] is not None:
            raise ConfigError(
                "train.epochs", value, f"train.max_steps={known['max_steps']} decides; ask for more of it"
            )
        if before.lora.variant == "adalora":
            raise ConfigError(f"train.{name}", value, "adalora has spread its budget over the steps; start a new run")
    return goals


def _changed(before: TrainRun, asked: ResumeRun) -> TrainRun:
    """The run as it goes on."""
    training = {name: value for name, value in asdict(asked.train).items() if value is not None}
    device = {name: value for name, value in asdict(asked.device).items() if value is not None}
    return replace(
        before,
        train=replace(before.train, **training),
        device=replace(before.device, **device),
        tracker=asked.tracker or before.tracker,
    )


def _prolonged(experiment: Experiment, before: TrainRun, progress: Progress | None) -> str:
    """What a later end means for the steps that are done, in one line.

    Raises:
        ConfigError: it would come no later.
    """
    from lora_cli.engine.optim import rate
    from lora_cli.engine.train import total_steps

    after, size = experiment.spec.train, len(experiment.data["train"].examples)
    old, new, done = total_steps(before.train, size), total_steps(after, size), progress.step if progress else 0
    if new < old:
        raise ConfigError("train.max_steps", new, f"the run has {old} steps; more can be asked for, not less")
    if progress and progress.stopped_early and (after.patience or 0) <= progress.stale:
        allowed = f"it stopped at step {done}, {progress.stale} scorings after its best; more than that goes on"
        raise ConfigError("train.patience", after.patience, allowed)
    if progress and not progress.stopped_early and done == new:
        raise ConfigError("train.max_steps", new, f"all {done} steps are done; more can be asked for")
    if all(rate(step, old, before.train) == rate(step, new, after) for step in range(done)):
        return f"{old} to {new} steps; the {done} done had the rates of the longer training"
    now, was = rate(done, new, after) * after.lr, rate(done, old, before.train) * after.lr
    return (
        f"{old} to {new} steps; rates from step {done + 1} on are those of the longer schedule, {now:.2e} where it was "
        f"{was:.2e}: this is not a training of {new} steps from the start"
    )
