"""What a training takes on this machine, from a few of its own steps in this process, which does nothing else.

The steps are those of the one training loop, as they come, with a scoring and a checkpoint; then its largest batch,
and the saving of the adapter.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_cli.disk import atomic_folder
from lora_cli.engine import checkpoint as checkpoints
from lora_cli.engine.batches import by_length
from lora_cli.engine.checkpoint import Checkpoint, Progress
from lora_cli.engine.generate import generate
from lora_cli.engine.micro_step import Training, alone
from lora_cli.engine.train import NEVER
from lora_cli.experiment import Experiment
from lora_cli.forecast import load_of, num_scorings, worst_batch
from lora_cli.spec import TrainRun
from lora_cli.tasks import Encoded, EncodedTexts, TextTask, build_task, load_rows
from lora_cli.unpadded import removes_padding

__all__ = ["Measured", "measured"]

_LEAST, _MOST = 4, 40
"""Steps that are timed."""
_SAMPLED = 4
"""Batches of a split that are scored."""
_LONGEST = 12
"""Batches in a row that are scored for the peak alone: an allocator grows with the first few of different lengths."""
_FAR = 10**9


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Bytes and seconds. Memory is the process's resident set, or what is allocated on a GPU."""

    resident: int
    """Before the first step: the process and the weights."""
    peak: int
    start_s: float
    """Libraries imported, weights loaded, rows encoded, an evaluation rehearsed."""
    train_s: float
    """All steps."""
    scoring_s: float
    """All scorings: of the validation split while training, of the scored splits at the end."""
    saving_s: float
    """All checkpoints, and the adapter with its checks."""
    steps_timed: int

    @property
    def wall_s(self) -> float:
        """From the first to the last."""
        return self.start_s + self.train_s + self.scoring_s + self.saving_s


@dataclass
class _Notes:
    """The loop's side effects: where it stands, and checkpoints that are written and timed."""

    folder: Path
    progress_s: float = 0.0
    saves: list[float] = field(default_factory=list)

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        """Nobody reads them."""

    def progress(self, progress: Progress, total: int, loss: float, lr: float) -> None:
        self.progress_s = progress.train_s

    def scored(self, step: int, metrics: Mapping[str, float | None], *, best: bool) -> None:
        """Nobody reads them."""

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        started = time.perf_counter()
        checkpoints.save(self.folder, checkpoint, identity={}, keep=1, whole=atomic_folder)
        self.saves.append(time.perf_counter() - started)


def measured(spec: TrainRun, *, seconds: float, folder: Path, started: float) -> Measured:
    """Take some steps of the training `spec`, for about so many seconds, and leave in `folder` what they write.

    The clock has run since `started`, a time.perf_counter().
    """
    spec = replace(spec, train=replace(spec.train, cache="off", patience=None))
    # Where it starts costs nothing, and an alternative need not fit there.
    spec = replace(spec, lora=replace(spec.lora, init_from=None, init_digest=None))
    task = build_task(spec.task)
    scored = list(dict.fromkeys([spec.task.split, *spec.task.extra_splits]))
    rows = load_rows(task, list(dict.fromkeys(["train", "validation", *scored])), seed=spec.seed_for("data"))
    task.fit_labels(rows["train"])
    experiment = Experiment.build(spec, task, rows)
    experiment.rehearse()
    start_s = time.perf_counter() - started
    resident = experiment.device.resident_memory()
    examples = experiment.data["train"].examples
    is_packed = removes_padding(experiment.base.model)
    load = load_of(spec, examples, is_packed=is_packed)
    largest = partial(worst_batch, spec, examples, is_packed=is_packed)
    per_step_s = _two_steps(experiment, largest(steps=1), folder)
    steps = min(load.steps, max(_LEAST, min(_MOST, int(seconds / per_step_s))))
    notes = _Notes(folder / "checkpoints")
    notes.folder.mkdir()
    # Scored as a training does, right after its steps: what an allocator has kept of these is part of the peak.
    writes = experiment.task.generates
    part = (_sample if writes else _longest)(experiment, "validation")
    typical = _with(experiment, steps, every=steps, validation=part)
    alone(typical.training)(notes, None, NEVER)
    if steps < load.steps:
        _two_steps(experiment, largest(steps=load.steps), folder)
    timed = load_of(typical.spec, examples, is_packed=is_packed)
    scorings = num_scorings(spec, len(examples), load.steps)
    scoring_s = scorings * _scoring_s(experiment, "validation", answers=False)
    known = set() if writes else {"validation"}
    scoring_s += sum(_scoring_s(experiment, split, answers=True) for split in scored if split not in known)
    for split in dict.fromkeys(["validation", *scored]):
        if split not in known:
            longest = replace(experiment, data={**experiment.data, split: _longest(experiment, split)})
            longest.score(split, answers=False)
    saves = load.steps // spec.train.save_every if spec.train.save_every else scorings
    started = time.perf_counter()
    experiment.save(folder / "adapter")
    saving_s = time.perf_counter() - started + saves * max(notes.saves)
    return Measured(
        resident=resident,
        peak=round(experiment.device.peak_memory_mib() * 2**20),
        start_s=start_s,
        train_s=notes.progress_s / timed.tokens * load.tokens,
        scoring_s=scoring_s,
        saving_s=saving_s,
        steps_timed=steps,
    )


def _with(experiment: Experiment, steps: int, *, every: int, **data: Encoded) -> Experiment:
    """The experiment with so many steps, on other data."""
    train = replace(
        experiment.spec.train, max_steps=steps, eval_every=every, save_every=None, log_every=1, restore_best=False
    )
    spec = replace(experiment.spec, train=train)
    return replace(experiment, spec=spec, data={**experiment.data, **data})


def _two_steps(experiment: Experiment, batch: Sequence[int], folder: Path) -> float:
    """Take two steps on a batch, the second with an optimizer's state; returns how long the second took."""
    whole = experiment.data["train"]
    data = replace(whole, examples=[whole.examples[number] for number in batch])
    only = _with(experiment, _FAR, every=_FAR, train=data)
    requests: Training[Any] = only.training(_Notes(folder), None, NEVER)
    step = next(requests)
    for _ in range(2):
        started = time.perf_counter()
        step = requests.send(step.gradients())
    requests.close()
    return time.perf_counter() - started


def _sample(experiment: Experiment, split: str) -> Encoded:
    """Some batches of a split, the longest among them."""
    data = experiment.data[split]
    batches = _batches(experiment, split)
    chosen = batches[:: max(1, len(batches) // _SAMPLED)][:_SAMPLED]
    return replace(data, examples=[data.examples[number] for batch in chosen for number in batch])


def _longest(experiment: Experiment, split: str) -> Encoded:
    """The batches of a split that a scoring begins with."""
    data = experiment.data[split]
    numbers = [number for batch in _batches(experiment, split)[:_LONGEST] for number in batch]
    return replace(data, examples=[data.examples[number] for number in numbers])


def _batches(experiment: Experiment, split: str) -> list[list[int]]:
    lengths = [example.num_tokens for example in experiment.data[split].examples]
    return by_length(lengths, experiment.spec.train.eval_batch_size)


def _scoring_s(experiment: Experiment, split: str, *, answers: bool) -> float:
    """How long scoring a split takes, from a part of it."""
    whole, part = experiment.data[split], _sample(experiment, split)
    shorter = replace(experiment, data={**experiment.data, split: part})
    started = time.perf_counter()
    shorter.score(split, answers=False)
    share = sum(e.num_tokens for e in part.examples) / sum(e.num_tokens for e in whole.examples)
    losses_s: float = (time.perf_counter() - started) / share
    if not (answers and isinstance(experiment.task, TextTask) and experiment.task.generates):
        return losses_s
    assert isinstance(whole, EncodedTexts)
    queries = whole.queries[: experiment.spec.train.eval_batch_size]
    started = time.perf_counter()
    for _ in generate(
        experiment.base.model,
        queries,
        experiment.task.spec.decode,
        tokenizer=experiment.base.tokenizer,
        device=experiment.device,
        batch_size=len(queries),
    ):
        pass
    answers_s = (time.perf_counter() - started) * len(whole.queries) / len(queries)
    return answers_s + (losses_s if "perplexity" in experiment.task.spec.metrics else 0.0)
