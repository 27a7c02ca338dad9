"""lora train: rows and a base model in, a run folder with an adapter out.

torch and transformers are imported once the data is known to be good: what a person mistyped is told at once.
"""

from __future__ import annotations

import io
import shlex
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli import ranks
from lora_cli.config import to_plain
from lora_cli.disk import atomic_folder, write_atomic
from lora_cli.errors import ConfigError, RunError
from lora_cli.process import GentleStop, gentle_stop
from lora_cli.runs.directory import RunDirectory
from lora_cli.runs.expectation import verdicts
from lora_cli.runs.manifest import write_manifest
from lora_cli.runs.registry import run_of
from lora_cli.runs.report import model_card
from lora_cli.runs.starts import pinned
from lora_cli.screen import Screen
from lora_cli.spec import TextSpec, TrainRun
from lora_cli.tasks import (
    Rows,
    Scorer,
    Task,
    TextScorer,
    build_task,
    load_rows,
    overlap,
    repeats,
)
from lora_cli.trackers import check_tracker
from lora_cli.train_view import show

if TYPE_CHECKING:
    from lora_cli.engine.checkpoint import Checkpoint
    from lora_cli.engine.micro_step import Training
    from lora_cli.experiment import Experiment

__all__ = [
    "completing",
    "follow",
    "going_on",
    "kept_run",
    "load_splits",
    "make",
    "newest_checkpoint",
    "prepare",
    "report",
    "run",
]

Metrics = Mapping[str, float | None]


def run(spec: TrainRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> float | None:
    """Train, score and save as `spec` says; returns the primary metric of the scored split.

    The run folder is `directory`, or a new one under runs/.

    Raises:
        UserError: something given does not fit.
        TrainingFailure: the training cannot go on; its checkpoints stay.
    """
    if not ranks.is_first():
        follow(spec)
        return None
    started, screen = time.perf_counter(), Screen()
    spec, kept = _known(pinned(spec), directory)
    if spec.train.batch_size == "auto":
        if ranks.is_one_of_many():
            raise ConfigError("train.batch_size", "auto", "not with torchrun; a number, as lora plan helps to find it")
        spec = _settled(spec, screen)
    with ranks.beside(spec, follow):
        task = build_task(spec.task)
        rows = load_splits(spec, task, screen)
        from lora_cli.engine.micro_step import alone

        return alone(going_on)(
            spec,
            rows,
            lambda: prepare(spec, task, rows, screen),
            screen,
            kept=kept,
            directory=directory,
            overrides=overrides,
            started=started,
        )


def follow(spec: TrainRun) -> None:
    """Do the part of a process that is not the first: it keeps no file and says nothing.

    Raises:
        UserError: something given does not fit.
        TrainingFailure: the training cannot go on, here or in another process.
    """
    from lora_cli.engine.device import open_device
    from lora_cli.engine.micro_step import alone
    from lora_cli.engine.train import NEVER, Stopped
    from lora_cli.recording import Silence

    # Whether to stop is for the first to decide: all have to stop at the same step.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    quiet = Screen(io.StringIO())
    if not open_device(spec.device).world.from_first(True):
        return
    spec, task = pinned(spec), build_task(spec.task)
    experiment = prepare(spec, task, load_splits(spec, task, quiet), quiet)
    with suppress(Stopped), tempfile.TemporaryDirectory() as folder:
        _, validated = alone(experiment.training)(Silence(), None, NEVER)
        experiment.save(Path(folder) / "adapter")
        for split in _scored_splits(spec):
            if split != "validation" or validated is None:
                experiment.score(split)


def _known(spec: TrainRun, directory: Path | None) -> tuple[TrainRun, RunDirectory | None]:
    """`spec` and its `kept_run`: where the batch size is auto, with the one that the run has come to."""
    for each in spec.candidates() if spec.resume == "auto" else []:
        with suppress(RunError):
            kept = kept_run(each, directory)
            if kept is not None:
                return each, kept
    return spec, kept_run(spec, directory)


def _settled(spec: TrainRun, screen: Screen) -> TrainRun:
    """`spec` with the batch size that auto comes to on this machine now."""
    from lora_cli.batch_size import settled

    spec, found = settled(spec)
    screen.fact("batch", found.describe(spec))
    return spec


def kept_run(spec: TrainRun, directory: Path | None) -> RunDirectory | None:
    """The run that `spec` is to go on with, if it is to and there is one; None: a new one, for which there is room.

    Raises:
        UserError: `directory` holds something else, or the tracker is not there.
    """
    check_tracker(spec.tracker)
    kept = run_of(to_plain(spec), directory) if spec.resume == "auto" else None
    if kept is not None:
        kept.check_plain()
    elif directory is not None:
        RunDirectory.check_free(directory)
    return kept


def going_on(
    spec: TrainRun,
    rows: Mapping[str, Rows],
    prepared: Callable[[], Experiment],
    screen: Screen,
    *,
    kept: RunDirectory | None,
    directory: Path | None,
    overrides: Sequence[str],
    started: float,
    **how: Any,
) -> Training[float | None]:
    """The run `kept`, or a new one, from where it stands to its end; `how` is as for `completing`.

    Raises:
        UserError: something given does not fit.
        TrainingFailure: the training cannot go on; its checkpoints stay.
    """
    if kept is not None:
        facts = kept.facts()
        if facts["status"] == "finished":
            _check_same_rows(kept, rows)
            _call_others(spec, False)
            return report(screen, kept, facts["metrics"], spec)
        if facts.get("extended"):
            how_to = f"lora resume {shlex.quote(f'run={kept.path}')} continues it"
            raise RunError(f"{kept.path}: was prolonged since; {how_to}")
    experiment = prepared()
    folder = kept or RunDirectory.create(to_plain(spec), directory=directory, overrides=overrides)
    with folder.held():
        resume = newest_checkpoint(experiment, folder) if kept else None
        metrics = yield from completing(experiment, folder, resume, screen, overrides=overrides, started=started, **how)
    return report(screen, folder, metrics, spec)


def make(
    spec: TrainRun, task: Task, screen: Screen, *, directory: Path | None, overrides: Sequence[str], started: float
) -> tuple[RunDirectory, dict[str, Metrics]]:
    """A new run from the first step to the last: its folder, and the metrics of the scored splits.

    Raises:
        UserError: something given does not fit.
        TrainingFailure: the training cannot go on; its checkpoints stay.
    """
    from lora_cli.engine.micro_step import alone

    spec = pinned(spec)
    with ranks.beside(spec, follow):
        experiment = prepare(spec, task, load_splits(spec, task, screen), screen)
        folder = RunDirectory.create(to_plain(spec), directory=directory, overrides=overrides)
        with folder.held():
            return folder, alone(completing)(experiment, folder, None, screen, overrides=overrides, started=started)


def prepare(spec: TrainRun, task: Task, rows: Mapping[str, Rows], screen: Screen) -> Experiment:
    """Everything that the training needs, shown and rehearsed.

    Raises:
        UserError: something given does not fit.
        TrainingFailure: a self-check fails.
    """
    from lora_cli.experiment import Experiment

    if ranks.is_first():
        _call_others(spec, True)
    experiment = Experiment.build(spec, task, rows)
    show(screen, experiment)
    experiment.rehearse()
    return experiment


def _call_others(spec: TrainRun, is_to_come: bool) -> None:
    """Tell processes that wait for this one whether there is something to train."""
    if ranks.is_one_of_many():
        from lora_cli.engine.device import open_device

        open_device(spec.device).world.from_first(is_to_come)


def newest_checkpoint(experiment: Experiment, folder: RunDirectory) -> Checkpoint | None:
    """The state from which the run in `folder` goes on, if any.

    Raises:
        RunError: data, base model, machine or libraries are not those it was begun with.
    """
    from lora_cli.engine import checkpoint

    return checkpoint.load_newest(folder.checkpoints, identity=_identity(experiment, folder))


def completing(
    experiment: Experiment,
    folder: RunDirectory,
    resume: Checkpoint | None,
    screen: Screen,
    *,
    overrides: Sequence[str],
    started: float,
    stopping: Callable[[], AbstractContextManager[GentleStop]] = gentle_stop,
    **facts: Any,
) -> Training[dict[str, Metrics]]:
    """Train from `resume` or the start to the end, save and score; `facts` go into run.json when it begins.

    `stopping` is for the time of the steps.

    Raises:
        TrainingFailure: the training cannot go on; its checkpoints stay.
    """
    from lora_cli.engine.train import Stopped
    from lora_cli.recording import recording
    from lora_cli.tokenizer import save_tokenizer

    spec = experiment.spec
    with _noted(folder):
        folder.update(status="running", **experiment.facts(), **facts)
        with atomic_folder(folder.tokenizer) as temporary:
            save_tokenizer(experiment.base.tokenizer, temporary)
        folder.cut_metrics(resume.progress.step if resume else 0, scored=not (resume and resume.progress.unscored))
        if resume is not None:
            screen.fact("resumes", f"{folder.path} from step {resume.progress.step}")
        recorded = recording(folder, screen, experiment, _identity(experiment, folder))
        with recorded as recorder, stopping() as stop, suppress(Stopped):
            progress, validated = yield from experiment.training(recorder, resume, stop)
        experiment.save(folder.adapter)
        known = {} if validated is None else {"validation": validated}
        metrics: dict[str, Metrics] = {
            split: _score(experiment, split, folder, screen, known) for split in _scored_splits(spec)
        }
        folder.update(metrics=metrics, steps=progress.step, best_step=progress.best_step)
        if spec.recipe is not None:
            folder.update(expected=[each.facts for each in verdicts(spec, [folder.facts()], overrides)])
        write_atomic(folder.adapter / "README.md", model_card(to_plain(spec), folder.facts(), overrides))
        folder.finish(cost={**experiment.cost(progress), "wall_s": time.perf_counter() - started})
        write_manifest(folder.path)
    return metrics


def _identity(experiment: Experiment, folder: RunDirectory) -> dict[str, str]:
    return {"configuration": folder.facts()["signature"], **experiment.identity}


def load_splits(spec: TrainRun, task: Task, screen: Screen) -> dict[str, Rows]:
    """Every split that the run reads, with its labels known, and a warning for what looks wrong.

    Raises:
        DataError: a file, a column or a row cannot be used.
    """
    needed = list(dict.fromkeys(["train", "validation", *_scored_splits(spec)]))
    rows = load_rows(task, needed, seed=spec.seed_for("data"))
    task.fit_labels(rows["train"])
    for found in rows.values():
        task.check(found)
    if again := repeats(rows["train"], task.all_columns):
        screen.warning(f"{again:,} of {len(rows['train']):,} train rows stand there more than once")
    for split in needed[1:]:
        if shared := overlap(rows["train"], rows[split], task.columns):
            screen.warning(f"{shared:,} of {len(rows[split]):,} {split} rows stand in train as well")
    for split, found in rows.items():
        if found.num_unlabelled:
            screen.warning(f"{found.num_unlabelled:,} {split} rows without a gold label are left out")
    return rows


def _check_same_rows(folder: RunDirectory, rows: Mapping[str, Rows]) -> None:
    known = folder.facts()["data"]
    changed = [split for split, found in rows.items() if known.get(split, {}).get("fingerprint") != found.fingerprint]
    if changed:
        raise RunError(f"{folder.path}: finished on other data, {' and '.join(changed)} changed since; start a new run")


def _scored_splits(spec: TrainRun) -> list[str]:
    return list(dict.fromkeys([spec.task.split, *spec.task.extra_splits]))


def _score(
    experiment: Experiment,
    split: str,
    folder: RunDirectory,
    screen: Screen,
    known: Mapping[str, Scorer | TextScorer],
) -> dict[str, float | None]:
    """Score one split with the saved adapter, and keep its predictions.

    A split in `known` was scored with the same weights: what was saved has just been found to compute the same bits.
    """
    scorer = known[split] if split in known else experiment.score(split, progress=screen.counter(f"answers {split}"))
    folder.write_predictions(split, scorer.predictions)
    for name, reason in scorer.undefined.items():
        screen.warning(f"{split}/{name} is undefined: {reason}")
    return scorer.result()


@contextmanager
def _noted(folder: RunDirectory) -> Iterator[None]:
    """What ends a run before its time goes into its folder; who interrupts it is told how to go on."""
    try:
        yield
    except BaseException as error:
        folder.stopped(error)
        if isinstance(error, KeyboardInterrupt):
            raise type(error)(f"lora resume {shlex.quote(f'run={folder.path}')} continues it") from error
        raise


def report(screen: Screen, folder: RunDirectory, metrics: Mapping[str, Metrics], spec: TrainRun) -> float | None:
    """The last lines: results, whether they are those of the recipe, where they are, what to type next."""
    task = spec.task
    screen.results(metrics)
    for each in verdicts(spec, [folder.facts()], folder.overrides()) if spec.recipe else ():
        screen.line(each.line)
    word = "prompt" if isinstance(task, TextSpec) else "text"
    screen.line(f'{folder.path}\nnext: lora eval run=latest · lora infer run=latest {word}="…"')
    return metrics.get(task.split, {}).get(task.metrics[0])
