"""What is kept of a training while it runs: figures, progress, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from lora_cli.config import to_plain
from lora_cli.disk import atomic_folder
from lora_cli.engine import checkpoint as checkpoints
from lora_cli.engine.checkpoint import Checkpoint, Progress
from lora_cli.experiment import Experiment
from lora_cli.foresight import Foresight
from lora_cli.runs.directory import RunDirectory
from lora_cli.screen import Screen
from lora_cli.trackers import Tracker, open_tracker

__all__ = ["Recording", "Silence", "recording"]

Metrics = Mapping[str, float | None]


class Silence:
    """Hears what a training tells, and keeps nothing: the first process does."""

    def metrics(self, step: int, values: Metrics) -> None: ...

    def progress(self, progress: Progress, total: int, loss: float, lr: float) -> None: ...

    def scored(self, step: int, metrics: Metrics, *, best: bool) -> None: ...

    def checkpoint(self, checkpoint: Checkpoint) -> None: ...


class Recording:
    """The loop's side effects: metrics to run folder and tracker, progress to the screen, checkpoints to disk."""

    def __init__(
        self,
        folder: RunDirectory,
        screen: Screen,
        tracker: Tracker,
        keep: int,
        identity: Mapping[str, str],
        foresight: Foresight,
    ) -> None:
        self._foresight = foresight
        self._foretold = folder.facts().get("forecast", {}).get("steps")
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
        # A training that goes on keeps what was foretold of it, one that was prolonged does not.
        if self._foretold != total and progress.step < total:
            self._foretold = total
            self._folder.update(forecast=self._foresight.facts(progress.step, total, progress.train_s))

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        checkpoints.save(
            self._folder.checkpoints, checkpoint, identity=self._identity, keep=self._keep, whole=atomic_folder
        )


@contextmanager
def recording(
    folder: RunDirectory, screen: Screen, experiment: Experiment, identity: Mapping[str, str]
) -> Iterator[Recording]:
    """A recorder for the time of a training; checkpoints are kept under `identity`."""
    spec = experiment.spec
    tracker = open_tracker(spec.tracker, folder.path, to_plain(spec))
    try:
        yield Recording(folder, screen, tracker, spec.train.keep, identity, Foresight(experiment))
    finally:
        screen.close()
        tracker.close()
