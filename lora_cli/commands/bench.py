"""lora bench: tasks, methods and seeds in, a table of what one base with an adapter a task reaches and costs out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_cli import bench_view as view
from lora_cli.config import group_flags, to_plain
from lora_cli.disk import write_atomic
from lora_cli.errors import ConfigError, TrainingFailure, UnknownName, UserError
from lora_cli.options import group_options
from lora_cli.runs.benchmark import Score, Storage, average, score, storage, write_benchmark
from lora_cli.runs.comparison import Goal, Training, comparison_folder, unequal
from lora_cli.runs.directory import signature
from lora_cli.runs.published import average as published_average
from lora_cli.runs.published import figures, write_published
from lora_cli.screen import Screen
from lora_cli.sources import weight_bytes
from lora_cli.spec import BenchRun
from lora_cli.trials import Trial, failures, plan_recipe, plan_trials, train_fused, train_isolated

__all__ = ["run"]

_OWN = ("tasks", "methods", "seeds", "launcher")
_NOT_WITH_RECIPE = {
    "methods": "its method is its own",
    "lora": "its method is its own",
    "task": "name the tasks: tasks=[...]",
}


def run(spec: BenchRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> None:
    """Train every method on every task with every seed and put them side by side, with storage and switching times; or
    a recipe on all of its tasks, beside its published figures.

    Tables go to `directory`, or to a new folder under runs/, and the runs below it. A training that an earlier
    benchmark or comparison has finished is not repeated, one that was interrupted goes on.

    Raises:
        UserError: a task or method does not exist, or does not fit with the rest. Nothing has been trained then.
        TrainingFailure: a training failed; the table shows the others all the same.
    """
    screen = Screen()
    if spec.recipe is not None:
        spec = _of_recipe(spec, spec.recipe, overrides)
        trials = {task: plan_recipe(str(spec.recipe), task, spec.all_seeds, overrides, own=_OWN) for task in spec.tasks}
        spec = dataclasses.replace(spec, model=trials[spec.tasks[0]][0].spec.model)
    else:
        trials = {task: _plan(spec, task, overrides) for task in spec.tasks}
    folder = directory or _folder(spec, trials)
    screen.fact("folder", str(folder))
    goals = {task: _goal(of) for task, of in trials.items()}
    done = _train_all(spec, trials, goals, folder, screen, only_there=directory is not None)
    trainings = [training for task in spec.tasks for training in done[task]]
    differing = {task: found for task in spec.tasks if (found := unequal(done[task]))}
    facts: dict[str, Any] = {"model": spec.model.name, "tasks": spec.tasks, "methods": spec.methods}
    facts |= {"seeds": spec.all_seeds, "launcher": spec.launcher, "differ_in": differing}
    if spec.recipe is not None:
        _finish_recipe(spec, trials, done, overrides, folder, facts, screen)
    else:
        _finish_methods(spec, goals, done, folder, facts, screen)
    for task, conditions in differing.items():
        screen.warning(f"{task}: the trainings differ in {', '.join(conditions)}: they are not comparable")
    if failed := failures(trainings):
        raise TrainingFailure(failed)


def _of_recipe(spec: BenchRun, recipe: str, overrides: Sequence[str]) -> BenchRun:
    """`spec` with the tasks of `recipe`, unless some were typed, and LoRA as the only method."""
    known = group_options("recipe", group_flags())
    if recipe not in known:
        raise UnknownName("recipe", recipe, known, "recipe")
    typed = {key: value for key, _, value in (word.lstrip("+~").partition("=") for word in overrides)}
    for key, why in _NOT_WITH_RECIPE.items():
        if key in typed:
            raise ConfigError(key, typed[key], f"not with recipe={recipe}: {why}")
    options = group_options(f"recipe/{recipe}", group_flags())
    tasks = spec.tasks if "tasks" in typed else options
    if unknown := next((task for task in tasks if task not in options), None):
        raise UnknownName("tasks", unknown, options, f"task of recipe={recipe}")
    return dataclasses.replace(spec, tasks=tasks, methods=["lora"])


def _finish_recipe(
    spec: BenchRun,
    trials: Mapping[str, Sequence[Trial]],
    done: Mapping[str, Sequence[Training]],
    overrides: Sequence[str],
    folder: Path,
    facts: Mapping[str, Any],
    screen: Screen,
) -> None:
    """Write and show what each task reached beside what is published."""
    num_seeds = len(spec.all_seeds)
    found = [
        each for task in spec.tasks for each in figures(task, trials[task][0].spec, done[task], num_seeds, overrides)
    ]
    recipe = trials[spec.tasks[0]][0].spec.recipe
    assert recipe is not None, "composed with one"
    whose = {"recipe": {"name": recipe.name, "source": recipe.source, "base": recipe.base}}
    trainings = [training for task in spec.tasks for training in done[task]]
    write_published(folder, {**facts, **whose}, found, trainings)
    screen.show(view.published_view(found, published_average(found)))
    for line in view.published_notes(found):
        screen.line(line)
    screen.line(f"\n{folder}\nbench.json, table.csv")


def _finish_methods(
    spec: BenchRun,
    goals: Mapping[str, Goal],
    done: Mapping[str, Sequence[Training]],
    folder: Path,
    facts: Mapping[str, Any],
    screen: Screen,
) -> None:
    """Write and show what each method reached and costs."""
    scores = [each for task in spec.tasks for each in score(goals[task], task, done[task], len(spec.all_seeds))]
    scores += average(scores)
    trainings = [training for task in spec.tasks for training in done[task]]
    stored = _stored(spec, trainings)
    switching = _switching(spec, trainings, screen)
    write_benchmark(folder, {**facts, "switching": switching}, scores, stored, trainings)
    _show(spec, folder, scores, stored, switching, trainings, screen)


def _plan(spec: BenchRun, task: str, overrides: Sequence[str]) -> list[Trial]:
    for word in overrides:
        key, _, value = word.lstrip("+~").partition("=")
        if key == "task":
            raise ConfigError("task", value, f"name the tasks: tasks=[{value}]")
    options = group_options("task", group_flags())
    if task not in options:
        raise UnknownName("tasks", task, options, "task")
    return plan_trials(spec.methods, spec.all_seeds, overrides, own=_OWN, key="methods", task=task)


def _folder(spec: BenchRun, trials: Mapping[str, Sequence[Trial]]) -> Path:
    signatures = [trial.signature for of in trials.values() for trial in of]
    return comparison_folder("bench", "", to_plain(spec)["model"], {"launcher": spec.launcher}, signatures)


def _goal(trials: Sequence[Trial]) -> Goal:
    task = trials[0].spec.task
    return Goal(task.metrics[0], task.split, None)


def _train_all(
    spec: BenchRun,
    trials: Mapping[str, Sequence[Trial]],
    goals: Mapping[str, Goal],
    folder: Path,
    screen: Screen,
    *,
    only_there: bool,
) -> dict[str, list[Training]]:
    """Task → its trainings, in the order in which the methods were named."""
    total, number = sum(map(len, trials.values())), 0
    found: dict[str, list[Training]] = {}
    for task, of in trials.items():
        trainings = []
        if spec.launcher == "fused" and len(spec.all_seeds) > 1:
            for method in spec.methods:
                same = [trial for trial in of if trial.method == method]
                asked = signature({"trainings": [trial.signature for trial in same]})
                place = folder / f"{task}_{method}_{asked}"
                trainings += train_fused(same, goals[task], place, f"{number + 1}/{total}", screen)
                number += len(same)
        else:
            for trial in of:
                number += 1
                where = f"{number}/{total}"
                trainings.append(train_isolated(trial, goals[task], folder, where, screen, only_there=only_there))
        found[task] = sorted(trainings, key=lambda training: spec.methods.index(training.method))
    return found


def _stored(spec: BenchRun, trainings: Sequence[Training]) -> list[Storage]:
    """What each method takes on disk; a method that failed on a task is left out."""
    try:
        base = weight_bytes(spec.model)
    except UserError:
        return []  # Then no training had its base model either, and has said so.
    return [found for method in spec.methods if (found := storage(method, base, trainings))]


def _switching(spec: BenchRun, trainings: Sequence[Training], screen: Screen) -> dict[str, dict[str, float | None]]:
    """Method → from one task's answer to another's; a method that cannot be measured is told and left out."""
    from lora_cli.engine.device import open_device
    from lora_cli.serving.switching import time_adapters, time_whole_models

    seed, device = spec.all_seeds[0], open_device(spec.device)
    found: dict[str, dict[str, float | None]] = {}
    for method in spec.methods:
        # Of one seed: a base that is drawn is another one with another seed.
        done = [each for each in trainings if (each.method, each.seed) == (method, seed) and each.error is None]
        if not done:
            continue
        measure = time_whole_models if done[0].figures["trainable_share"] == 1 else time_adapters
        try:
            found[method] = dataclasses.asdict(measure([Path(each.run) for each in done], device))
        except UserError as error:
            screen.warning(f"{method}: switching is not measured: {error}")
    return found


def _show(
    spec: BenchRun,
    folder: Path,
    scores: Sequence[Score],
    stored: Sequence[Storage],
    switching: Mapping[str, Mapping[str, float | None]],
    trainings: Sequence[Training],
    screen: Screen,
) -> None:
    files = "bench.json, table.csv"
    if any(each.error is None for each in trainings):
        screen.show(view.scores_view(scores))
        is_fused = spec.launcher == "fused" and len(spec.all_seeds) > 1
        first, seeds = spec.methods[0], len(spec.all_seeds)
        screen.line(view.legend(first, seeds, fused=is_fused, methods=len(spec.methods)))
        figures: dict[tuple[str, str], dict[str, list[float]]] = {}
        for each in trainings:
            values = figures.setdefault((each.task, each.method), {})
            for name, value in each.figures.items():
                values.setdefault(name, []).extend([] if value is None else [value])
        title = f"{len(spec.tasks)} tasks with {spec.model.name}"
        write_atomic(folder / "plot.svg", view.plot(title, scores, figures))
        files += ", plot.svg"
    if stored:
        times = {method: of["switch_ms"] for method, of in switching.items() if of["switch_ms"] is not None}
        rows = next((int(of["rows"] or 0) for of in switching.values()), 0)
        screen.show(view.storage_view(stored, times, rows))
    screen.line(f"\n{folder}\n{files}")
