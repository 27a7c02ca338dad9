"""lora train: rows and a base model in, a run folder with an adapter out.

torch and transformers are imported once the data is known to be good: what a person mistyped is told at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.config import to_plain
from lora_cli.disk import atomic_folder, write_atomic
from lora_cli.errors import RunError
from lora_cli.runs.directory import RunDirectory
from lora_cli.runs.registry import run_of
from lora_cli.runs.report import model_card
from lora_cli.screen import Screen, count
from lora_cli.spec import TaskSpec, TextSpec, TrainRun
from lora_cli.tasks import Encoded, EncodedTexts, Rows, Task, build_task, load_rows, overlap, repeats
from lora_cli.trackers import Tracker, check_tracker, open_tracker

if TYPE_CHECKING:
    from lora_cli.engine.checkpoint import Checkpoint, Progress
    from lora_cli.experiment import Experiment

__all__ = ["run"]

Metrics = Mapping[str, float | None]


def run(spec: TrainRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> float | None:
    """Train, score and save as `spec` says; returns the primary metric of the scored split.

    The run folder is `directory`, or a new one under runs/.

    Raises:
        UserError: something given does not fit.
        TrainingFailure: the training cannot go on; its checkpoints stay.
    """
    started, screen, config = time.perf_counter(), Screen(), to_plain(spec)
    check_tracker(spec.tracker)
    kept = run_of(config, directory) if spec.resume == "auto" else None
    if kept is not None:
        kept.check_plain()
    elif directory is not None:
        RunDirectory.check_free(directory)
    task = build_task(spec.task)
    rows = _load_rows(spec, task, screen)
    if kept is not None and kept.facts()["status"] == "finished":
        _check_same_rows(kept, rows)
        return _report(screen, kept, kept.facts()["metrics"], spec.task)

    from lora_cli.engine import checkpoint
    from lora_cli.experiment import Experiment
    from lora_cli.tokenizer import save_tokenizer

    experiment = Experiment.build(spec, task, rows)
    _show(screen, experiment)
    experiment.rehearse()
    folder = kept or RunDirectory.create(config, directory=directory, overrides=overrides)
    with folder.held():
        folder.update(status="running", **experiment.facts())
        with atomic_folder(folder.tokenizer) as temporary:
            save_tokenizer(experiment.base.tokenizer, temporary)
        identity = {"configuration": folder.facts()["signature"], **experiment.identity}
        resume = checkpoint.load_newest(folder.checkpoints, identity=identity)
        folder.cut_metrics(resume.progress.step if resume else 0)
        if resume is not None:
            screen.fact("resumes", f"{folder.path} from step {resume.progress.step}")
        with _recording(folder, screen, spec, identity) as recorder:
            outcome = experiment.train(recorder, resume)
        experiment.save(folder.adapter)
        metrics = {split: _score(experiment, split, folder, screen) for split in _scored_splits(spec)}
        folder.update(metrics=metrics, steps=outcome.progress.step, best_step=outcome.progress.best_step)
        write_atomic(folder.adapter / "README.md", model_card(config, folder.facts(), overrides))
        folder.finish(cost={**experiment.cost(outcome.progress), "wall_s": time.perf_counter() - started})
    return _report(screen, folder, metrics, spec.task)


def _load_rows(spec: TrainRun, task: Task, screen: Screen) -> dict[str, Rows]:
    """Every split that the run reads, with its labels known, and a warning for what looks wrong."""
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


def _score(experiment: Experiment, split: str, folder: RunDirectory, screen: Screen) -> dict[str, float | None]:
    """Score one split with the saved adapter, and keep its predictions."""
    scorer = experiment.score(split, progress=screen.counter(f"answers {split}"))
    folder.write_predictions(split, scorer.predictions)
    for name, reason in scorer.undefined.items():
        screen.warning(f"{split}/{name} is undefined: {reason}")
    return scorer.result()


class _Recording:
    """The loop's side effects: metrics to run folder and tracker, progress to the screen, checkpoints to disk."""

    def __init__(
        self, folder: RunDirectory, screen: Screen, tracker: Tracker, keep: int, identity: Mapping[str, str]
    ) -> None:
        self._folder, self._screen, self._tracker, self._keep, self._identity = folder, screen, tracker, keep, identity

    def metrics(self, step: int, values: Metrics) -> None:
        self._folder.append_metrics({"step": step, **values})
        self._tracker.log(step, {name: value for name, value in values.items() if value is not None})

    def scored(self, step: int, metrics: Metrics, *, best: bool) -> None:
        self._screen.scored(step, metrics, best=best)
        self._folder.log(f"step {step}: " + ", ".join(f"{name} {value}" for name, value in metrics.items()))

    def progress(self, progress: Progress, total: int, loss: float, lr: float) -> None:
        left = progress.train_s / progress.step * (total - progress.step)
        rows_per_s, tokens_per_s = progress.rows / progress.train_s, progress.tokens / progress.train_s
        self._screen.step(progress.step, total, loss, lr, rows_per_s, tokens_per_s, left)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        from lora_cli.engine.checkpoint import save

        save(self._folder.checkpoints, checkpoint, identity=self._identity, keep=self._keep, whole=atomic_folder)


@contextmanager
def _recording(
    folder: RunDirectory, screen: Screen, spec: TrainRun, identity: Mapping[str, str]
) -> Iterator[_Recording]:
    """A recorder for the time of a training; how it stopped, if it did, goes into the run folder."""
    tracker = open_tracker(spec.tracker, folder.path, to_plain(spec))
    try:
        yield _Recording(folder, screen, tracker, spec.train.keep, identity)
    except BaseException as error:
        folder.stopped(error)
        raise
    finally:
        screen.close()
        tracker.close()


def _show(screen: Screen, experiment: Experiment) -> None:
    """What was understood, before anything is trained."""
    task, base, injection = experiment.task, experiment.base, experiment.injection
    screen.fact("task", f"{task.spec.name}: {task.describe()}")
    for split, encoded in experiment.data.items():
        screen.fact(split, _data_line(encoded, task.spec.max_length))
    screen.fact("model", f"{base.base_name} ({base.family}, from {base.source})")
    if base.quantized:
        screen.fact("quantised", base.quantized.describe())
    screen.fact("device", f"{experiment.device} ({experiment.device.reason})")
    table = [
        (_layers(row.pattern, row.modules), len(row.modules), _ranks(row.ranks), row.num_parameters)
        for row in injection.rows
    ]
    for name in injection.trained_whole:
        size = sum(parameter.numel() for parameter in base.model.get_submodule(name).parameters())
        table.append((f"{name} (whole)", 1, "", size))
    screen.targets(table)
    if injection.left_out:
        screen.fact("left out", f"{', '.join(injection.left_out)} (not layers that can be adapted)")
    share = injection.num_trainable / injection.num_total
    memory = sum(parameter.numel() * parameter.element_size() for parameter in base.model.parameters())
    memory += base.quantized.bytes if base.quantized else 0
    trainable, total = count(injection.num_trainable), count(injection.num_total)
    screen.fact(
        "in all", f"{trainable} of {total} parameters train ({share:.2%}); weights take {memory / 2**20:,.0f} MiB"
    )


def _data_line(encoded: Encoded, max_length: int) -> str:
    tokens = encoded.num_tokens / len(encoded.examples)
    line = f"{len(encoded.examples):,} rows of {tokens:.1f} tokens on average"
    if isinstance(encoded, EncodedTexts) and encoded.queries:
        line += f", {len(encoded.queries):,} distinct prompts"
    line += f", {encoded.num_truncated:,} cut at {max_length}" if encoded.num_truncated else ""
    if isinstance(encoded, EncodedTexts) and encoded.num_cut_targets:
        line += f", {encoded.num_cut_targets:,} answers cut"
    return line + (f", {encoded.num_empty:,} with an empty text" if encoded.num_empty else "")


def _layers(pattern: str, modules: Sequence[str]) -> str:
    """An entry of lora.targets, with the names it stands for."""
    names = list(dict.fromkeys(module.rpartition(".")[2] for module in modules))
    return pattern if names == [pattern] else f"{pattern}: {', '.join(names)}"


def _ranks(ranks: Sequence[int]) -> str:
    return "/".join(map(str, sorted(set(ranks))))


def _report(screen: Screen, folder: RunDirectory, metrics: Mapping[str, Metrics], task: TaskSpec) -> float | None:
    """The last lines: results, where they are, what to type next."""
    screen.results(metrics)
    word = "prompt" if isinstance(task, TextSpec) else "text"
    screen.line(f'{folder.path}\nnext: lora eval run=latest · lora infer run=latest {word}="…"')
    return metrics.get(task.split, {}).get(task.metrics[0])
