"""Methods and seeds, or a recipe, made into trainings, each had done or found done: what compare and bench share.

Every training is a `lora train` in a process of its own: an ordinary run, whose peak memory is nobody else's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from lora_cli import isolation
from lora_cli.config import compose, group_flags, to_plain
from lora_cli.errors import ConfigError, UnknownName, UserError
from lora_cli.reuse import clear, is_current
from lora_cli.runs.comparison import Goal, Training, find_training, read_training
from lora_cli.runs.directory import RunDirectory, signature
from lora_cli.runs.starts import pinned
from lora_cli.runs.sweep import TRAINED, read_jobs
from lora_cli.screen import Screen, significant
from lora_cli.spec import TrainRun

__all__ = ["Trial", "failures", "plan_recipe", "plan_trials", "train_fused", "train_isolated"]

_SAME = ("epochs", "max_steps", "batch_size", "accumulation", "length_window", "packing", "patience", "data_seed")
"""Keys of train.* that make the order of the data and the budget."""


@dataclass(frozen=True)
class Trial:
    """One training to come."""

    method: str
    seed: int
    spec: TrainRun
    words: tuple[str, ...]
    """What `lora train` has to be told for it, but for its seed."""
    task: str = ""
    """Its task, where there are several."""

    @property
    def signature(self) -> str:
        """That of its run."""
        return signature(to_plain(self.spec))

    @property
    def title(self) -> str:
        """For people: its task, where there are several, and method."""
        return f"{self.task} {self.method}".strip()

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.title.replace(' ', '_')}_seed{self.seed}_{self.signature}"


def plan_trials(
    methods: Sequence[str],
    seeds: Sequence[int],
    overrides: Sequence[str],
    *,
    own: Collection[str],
    key: str,
    task: str = "",
) -> list[Trial]:
    """All trainings, each method with the first seed before any with the second.

    `overrides` are the words of the command, of which `own` are keys (or, before a dot, sections) that no training
    takes; `key` is the one that holds the methods. `task` is given to each, where there are several.

    Raises:
        UserError: a method does not exist, does not fit with the rest, or has a budget of its own.
    """
    shared = [f"task={task}"] if task else []
    adapter: list[str] = []
    for word in overrides:
        name, _, value = word.lstrip("+~").partition("=")
        if name == "lora":
            raise ConfigError("lora", value, f"name the methods: {key}=[{value}]")
        if name.partition(".")[0] not in own:
            (adapter if name.startswith("lora.") else shared).append(word)
    found = {method: _composed(method, shared, adapter, key) for method in methods}
    _check_same_budget({method: spec for method, (spec, _) in found.items()}, key)
    return [
        Trial(method, seed, dataclasses.replace(spec, seed=seed), words, task)
        for seed in seeds
        for method, (spec, words) in found.items()
    ]


def plan_recipe(
    recipe: str, task: str, seeds: Sequence[int], overrides: Sequence[str], *, own: Collection[str]
) -> list[Trial]:
    """The training of `recipe` on `task`, once with each seed. `overrides` and `own` are those of `plan_trials`.

    lora.init_from among the words is for tasks that the recipe starts from another's adapter, and null makes even
    these start anew.

    Raises:
        UserError: the words do not fit, or the adapter that the training starts from is not given.
    """
    words = [f"recipe={recipe}", f"task={task}"]
    words += [word for word in overrides if word.lstrip("+~").partition("=")[0].partition(".")[0] not in own]
    found: TrainRun = compose("train", words)
    started = [word for word in words if word.lstrip("+").startswith("lora.init_from=")]
    assert found.recipe is not None, "composed with one"
    if (origin := found.recipe.starts_from) is None and started:
        words = [word for word in words if word not in started]
        found = compose("train", words)
    elif origin is not None and not started:
        first = f"give lora.init_from=RUN of `lora train recipe={recipe} task={origin}`"
        raise ConfigError(
            "tasks", task, f"starts from the adapter of {origin}: {first}, or lora.init_from=null for none"
        )
    spec = pinned(found)
    return [Trial("lora", seed, dataclasses.replace(spec, seed=seed), tuple(words), task) for seed in seeds]


def _composed(method: str, shared: Sequence[str], adapter: Sequence[str], key: str) -> tuple[TrainRun, tuple[str, ...]]:
    """The training of a method and the words that make it. `adapter` is for methods that have one."""
    words = [*shared, f"lora={method}"]
    try:
        found: TrainRun = compose("train", words)
        # full and head adapt nothing: lora.targets=[...] would make something else of them.
        if adapter and found.lora.targets:
            words += adapter
            found = compose("train", words)
    except UserError as error:
        if isinstance(error, UnknownName) and error.key == "lora":
            raise UnknownName(key, method, error.options, "method") from error
        raise ConfigError(key, method, str(error)) from error
    return pinned(found), tuple(words)


def _check_same_budget(methods: Mapping[str, TrainRun], key: str) -> None:
    (first, known), *others = methods.items()
    for method, found in others:
        for name in _SAME:
            ours, theirs = getattr(found.train, name), getattr(known.train, name)
            if ours != theirs:
                fault = f"its file sets train.{name}={ours}, {first} has {theirs}; all need the same data and budget"
                raise ConfigError(key, method, fault)
        if found.task != known.task:
            raise ConfigError(key, method, f"its file sets another task.* than that of {first}")
        # A method may say how the base is kept in memory, but not which one it is.
        if dataclasses.replace(found.model, quantization=known.model.quantization) != known.model:
            raise ConfigError(key, method, f"its file sets another model.* than that of {first}")


def train_isolated(
    trial: Trial, goal: Goal, folder: Path, number: str, screen: Screen, *, only_there: bool
) -> Training:
    """Have one training done in a process of its own, or found done, and read what it reached.

    With `only_there` it is looked for in `folder` alone.
    """
    kept = find_training(trial.signature, folder if only_there else None)
    path = kept.path if kept else folder / trial.name
    reused = kept is not None and is_current(kept, trial.spec)
    what = "found in" if reused else "goes on in" if kept else "in"
    screen.fact(number, f"{trial.title}, seed {trial.seed}, {what} {path.name if path.parent == folder else path}")
    if not reused:
        if why := clear(path):
            screen.warning(why)
        path.mkdir(parents=True, exist_ok=True)
        output = path / "output.txt"
        code = _run_train(
            [*group_flags(), *trial.words, "resume=auto", f"seed={trial.seed}", f"hydra.run.dir={path}"], output
        )
        if code != 0:
            error = isolation.last_line(output).removeprefix("lora train: ") or f"exit code {code}"
            return _failed(trial, path, error, screen)
    return _read(trial, path, goal, screen, reused=reused)


def train_fused(trials: Sequence[Trial], goal: Goal, folder: Path, number: str, screen: Screen) -> list[Training]:
    """Have the seeds of one method on one task trained as a sweep, which shares a base where it can.

    `folder` is the sweep's.
    """
    first, seeds = trials[0], ",".join(str(trial.seed) for trial in trials)
    screen.fact(number, f"{first.title}, seeds {seeds}, in {folder.name}")
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "output.txt"
    words = ["-m", "hydra/launcher=fused", *group_flags(), *first.words, f"seed={seeds}", f"hydra.sweep.dir={folder}"]
    code = _run_train(words, output)
    jobs = {job.signature: job for job in read_jobs(folder)}
    found = []
    for trial in trials:
        job = jobs.get(trial.signature)
        if job is not None and job.run is not None and job.status in TRAINED:
            found.append(_read(trial, Path(job.run), goal, screen, reused=job.status == "found"))
        else:
            why = (job.error or job.status) if job else isolation.last_line(output) or f"exit code {code}"
            found.append(_failed(trial, folder, why, screen))
    return found


def failures(trainings: Sequence[Training]) -> str | None:
    """How many of them failed, and the first of these; None: none did."""
    failed = [training for training in trainings if training.error is not None]
    if not failed:
        return None
    first, what = failed[0], f"{len(failed)} of {len(trainings)} trainings failed"
    return f"{what}, the first of them {first.title}, seed {first.seed}: {first.error}"


def _read(trial: Trial, path: Path, goal: Goal, screen: Screen, *, reused: bool) -> Training:
    figures, conditions = read_training(RunDirectory(path), goal)
    reached = f"{goal.metric} {significant(figures.get(goal.figure))}"
    screen.fact("", f"{reached} after {figures['steps']} steps")
    return Training(trial.method, trial.seed, str(path), figures, conditions, reused, task=trial.task)


def _failed(trial: Trial, path: Path, error: str, screen: Screen) -> Training:
    screen.warning(f"{trial.title}, seed {trial.seed}, failed: {error}")
    return Training(trial.method, trial.seed, str(path), error=error, task=trial.task)


def _run_train(words: Sequence[str], output: Path) -> int:
    """`lora train` with these words in a process of its own; what it says goes to `output`."""
    process = isolation.start_logged("train", words, output)
    try:
        process.join()
    except BaseException as error:
        _end(process)
        if isinstance(error, KeyboardInterrupt):
            raise type(error)("the same command goes on where it was") from error
        raise
    return process.exitcode or 0


def _end(process: BaseProcess) -> None:
    """Ask a training to save and end, and wait for it; interrupted again, ask again, which it obeys at once."""
    process.terminate()
    try:
        process.join()
    except BaseException:
        process.terminate()
        raise
