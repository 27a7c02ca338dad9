"""train.batch_size=auto: the largest batch that fits into memory, found by trying, in a process that is thrown away.

What was found stands in the run's configuration as if it had been typed, so nothing that goes on or repeats a run tries
again.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lora_cli import isolation, machine
from lora_cli.disk import write_atomic
from lora_cli.engine.device import unless_full
from lora_cli.engine.memory import footprint
from lora_cli.engine.micro_step import MicroStep
from lora_cli.errors import TrainingFailure
from lora_cli.experiment import Experiment
from lora_cli.spec import TrainRun
from lora_cli.tasks import build_task, load_rows

__all__ = ["Found", "settled"]

_SHARE = 0.9
"""Of the memory that is free."""


@dataclass(frozen=True)
class Found:
    """What the trials have shown."""

    batch_size: int
    peak: int
    """Bytes that its training takes."""
    limit: int
    """Bytes that it may."""
    next: int | None
    """The batch that was too large; None: there is none that is larger."""

    def describe(self, spec: TrainRun) -> str:
        """In words; `spec` has the batch."""
        train = spec.train
        line = f"{self.batch_size} × {train.accumulation} = {train.global_batch} rows a step (train.batch_size=auto): "
        line += f"takes {self.peak / 2**30:.2f} of {self.limit / 2**30:.2f} GiB"
        return line if self.next is None else f"{line}, {self.next} would not fit"


def settled(spec: TrainRun) -> tuple[TrainRun, Found]:
    """`spec`, whose batch size is auto, with the largest batch that fits.

    Raises:
        TrainingFailure: not even one row fits, or the trials fail otherwise; the text is what they said.
    """
    with tempfile.TemporaryDirectory(prefix="lora-batch-") as name:
        folder = Path(name)
        # Not forked: the peak of a process is its own only if it has started by itself.
        code = isolation.spawned(_work, spec, folder)
        if not (folder / "found.json").exists():
            how = isolation.last_line(folder / "output.txt") or f"ended with {code}, out of memory perhaps"
            raise TrainingFailure(f"train.batch_size=auto: no batch fits: {how}")
        # Killed for its memory, it has left the last batch for which it was not.
        found = Found(**json.loads((folder / "found.json").read_text(encoding="utf-8")))
    return spec.with_batch(found.batch_size), found


def _work(spec: TrainRun, folder: Path) -> None:
    isolation.settle([Path(os.devnull), folder / "output.txt", folder / "output.txt"], Path.cwd(), dict(os.environ))
    for found in _trials(spec):
        write_atomic(folder / "found.json", json.dumps(found.__dict__))


def _trials(spec: TrainRun) -> Iterator[Found]:
    """The largest batch found so far, again and again."""
    spec = replace(spec, train=replace(spec.train, cache="off"))
    candidates = [each.train.rows for each in spec.candidates()]
    task = build_task(spec.task)
    rows = load_rows(task, ["train", "validation"], seed=spec.seed_for("data"))
    task.fit_labels(rows["train"])
    experiment = Experiment.build(spec.with_batch(candidates[0]), task, rows)
    device = experiment.device
    limit = round(spec.train.memory_gib * 2**30) if spec.train.memory_gib else _free(device.free_memory())
    # The first one takes what is there once, whatever the batch.
    peaks = {0: _peak(experiment, 1)}
    found: Found | None = None
    for size in candidates:
        if _foreseen(peaks, size) > limit or (peak := _try(experiment, size)) is None or peak > limit:
            if found is None:
                raise TrainingFailure(f"one row takes {peaks[0] / 2**30:.2f} of {limit / 2**30:.2f} GiB")
            yield replace(found, next=size)
            return
        peaks[size] = peak
        found = Found(size, peak, limit, None)
        yield found
        if size >= len(experiment.data["train"].examples):
            return


def _free(on_device: int | None) -> int:
    return round(_SHARE * (machine.memory().available if on_device is None else on_device))


def _foreseen(peaks: dict[int, int], size: int) -> float:
    """What a batch will take if it grows as the last two did: on a CPU nobody survives one that is too large."""
    if len(peaks) < 2:
        return peaks[0]
    (small, before), (large, after) = list(peaks.items())[-2:]
    return after + (after - before) * (size - large) / (large - small)


def _try(experiment: Experiment, size: int) -> int | None:
    """The peak with a batch of the longest rows; None: memory has run out."""
    return unless_full(lambda: _peak(experiment, size))


def _peak(experiment: Experiment, size: int) -> int:
    model, device, task = experiment.base.model, experiment.device, experiment.task
    examples = sorted(experiment.data["train"].examples, key=lambda each: -each.num_tokens)[:size]
    batch = task.collate(examples)
    model.train()
    MicroStep(model, task, device.move(batch), device, (0,), task.num_targets(batch), device.scaler()).gradients()
    for parameter in model.parameters():
        parameter.grad = None
    fixed = footprint(model)
    # The optimizer's states, and the copies of what trains of the best scoring and of a checkpoint.
    return round(device.peak_memory_mib() * 2**20) + fixed.optimizer_bytes + 2 * fixed.gradient_bytes
