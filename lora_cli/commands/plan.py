"""lora plan: a configuration in, a table out of the memory and time that it and its alternatives will take.

This machine is asked by a few real steps, a GPU that is only named by arithmetic. Nothing is written.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from lora_cli import machine
from lora_cli.comparison_view import size
from lora_cli.config import compose
from lora_cli.errors import UnknownName, UserError, printable
from lora_cli.gpus import GPUS
from lora_cli.reader import load_reader
from lora_cli.screen import Screen, count, duration
from lora_cli.spec import PlanRun, TrainRun
from lora_cli.tasks import Encoded, Task, build_task, load_rows
from lora_cli.unpadded import can_remove_padding

if TYPE_CHECKING:
    from lora_cli.forecast import Forecast
    from lora_cli.sampled_steps import Measured

__all__ = ["run"]

_PROCESS = 600 * 2**20
"""Python, torch and transformers, or a GPU's context, where it is not measured."""
_MARGIN = 0.95
"""Share of the memory that is used up to the last; the rest goes to what nobody foresees."""
_BUSY = 0.4
"""Share of a GPU's peak that a training reaches, as a rule."""
_MANY = (2, 4, 8)
"""GPUs among which the base is shared out."""


@dataclass(frozen=True)
class _Place:
    """Where a training is to run, and what is known of it."""

    name: str
    memory: int
    process: int
    factor: float
    """Memory that grows with the batch, over what arithmetic says of it."""
    seconds: float | None
    """For one multiplication and addition; None: not known."""
    rest_s: float
    """Loading, scoring and saving."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One configuration; memory in bytes."""

    name: str
    needs: Forecast
    """Activations and logits as this place has them."""
    process: int
    peak: int
    train_s: float | None
    total_s: float | None
    fits: bool

    def flat(self) -> dict[str, Any]:
        """All of it by name."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"name": own.pop("name"), **dataclasses.asdict(own.pop("needs")), **own}


def run(spec: PlanRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> None:
    """Print what the training that `spec` describes will take. It writes nothing, so `directory` has no meaning here.

    Raises:
        UserError: something given does not fit, or no config of the model is at hand.
        TrainingFailure: the measured steps failed.
    """
    screen = Screen()
    if spec.plan.gpu is not None and spec.plan.gpu not in GPUS:
        raise UnknownName("plan.gpu", spec.plan.gpu, GPUS, "GPU in the table")
    task = build_task(spec.task)
    rows = load_rows(task, ["train"], seed=spec.seed_for("data"))
    task.fit_labels(rows["train"])
    reader = load_reader(spec.model, problem=task.head["problem"])
    data = task.encode(rows["train"], reader)
    on_gpu = spec.plan.gpu is not None
    from lora_cli.forecast import lay_out

    layout = lay_out(reader, task.head)
    own = _forecast(spec, task, layout, data, on_gpu=on_gpu)
    measured = None
    if spec.plan.measure and not on_gpu:
        from lora_cli.measured import measure

        measured = measure(spec, seconds=spec.plan.seconds)
    place = _place(spec, own, measured)
    found, refused = [_row("as given", own, place, measured)], []
    if on_gpu:
        try:
            sharded: TrainRun = compose("train", [*_training_words(overrides), "device=fsdp"])
            whole = _forecast(sharded, task, layout, data, on_gpu=on_gpu)
            for number in _MANY:
                name = f"{number} GPUs, device=fsdp"
                found.append(_row(name, _shared(spec, whole, number), place, gpus=number))
        except UserError as error:
            refused.append(f"device=fsdp: {error}")
    if spec.plan.alternatives:
        for name, words in _alternatives(spec, overrides):
            try:
                other: TrainRun = compose("train", words)
                if _same(other, spec):
                    continue
                found.append(_row(name, _forecast(other, task, layout, data, on_gpu=on_gpu), place))
            except UserError as error:
                refused.append(f"{name}: {error}")
    _show(spec, found, refused, place, measured, screen)


def _forecast(spec: TrainRun, task: Task, layout: Any, data: Encoded, *, on_gpu: bool) -> Forecast:
    from lora_cli.forecast import forecast, load_of

    writes = task.head["problem"] == "generation"
    is_packed = spec.train.packing is not False and can_remove_padding(layout.config.model_type, writes=writes)
    load = load_of(spec, data.examples, is_packed=is_packed)
    half = on_gpu if spec.device.precision == "auto" else spec.device.precision != "fp32"
    return forecast(spec, layout, load, half=half)


def _place(spec: PlanRun, own: Forecast, measured: Measured | None) -> _Place:
    if spec.plan.gpu is not None:
        gpu = GPUS[spec.plan.gpu]
        seconds = 1 / (gpu.tera_flops * 1e12 * _BUSY)
        return _Place(spec.plan.gpu, round(gpu.memory_gib * 2**30), _PROCESS, 1.0, seconds, 0.0)
    memory = machine.memory().available
    if measured is None:
        return _Place("this machine", memory, _PROCESS, 1.0, None, 0.0)
    trained = own.gradients + own.optimizer + own.copies
    by_batch = max(0, measured.peak - measured.resident - trained)
    return _Place(
        "this machine",
        memory,
        max(0, measured.resident - own.weights),
        by_batch / max(1, own.by_batch),
        measured.train_s / own.operations,
        measured.wall_s - measured.train_s,
    )


def _row(name: str, found: Forecast, place: _Place, measured: Measured | None = None, *, gpus: int = 1) -> _Row:
    needs = dataclasses.replace(
        found, activations=round(place.factor * found.activations), logits=round(place.factor * found.logits)
    )
    peak = measured.peak if measured else place.process + needs.fixed + needs.by_batch
    train_s = None if place.seconds is None else place.seconds * found.operations / gpus
    return _Row(
        name=name,
        needs=needs,
        process=place.process,
        peak=peak,
        train_s=train_s,
        total_s=None if train_s is None else train_s + place.rest_s,
        fits=peak <= _MARGIN * place.memory,
    )


def _shared(spec: TrainRun, own: Forecast, number: int) -> Forecast:
    """What each of several GPUs needs with device=fsdp: its part of the frozen weights, and of each step.

    One layer is whole at a time, which is little beside the rest.
    """
    from lora_cli.engine.memory import FP32

    # What is trained is whole on each GPU.
    trained = FP32 * (own.adapter + own.whole)
    weights = trained + math.ceil((own.weights - trained) / number)
    # Whole micro-batches where they can be shared out evenly, else rows of each.
    rows = spec.train.rows
    part = 1.0 if spec.train.accumulation % number == 0 else math.ceil(rows / number) / rows
    activations, logits = round(part * own.activations), round(part * own.logits)
    return dataclasses.replace(own, weights=weights, activations=activations, logits=logits)


def _alternatives(spec: PlanRun, overrides: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Name and words of each."""
    words = _training_words(overrides)
    plain = [word for word in words if not word.startswith(("lora=", "model.quantization="))]
    yield "full", [*(word for word in plain if not word.startswith("lora.")), "lora=full"]
    yield "LoRA", [*plain, "lora=lora"]
    yield "QLoRA (nf4)", [*plain, "lora=qlora"]
    for batch_size in (spec.train.rows // 2, 2 * spec.train.rows):
        if batch_size:
            yield f"batch of {batch_size}", [*words, f"train.batch_size={batch_size}"]
    yield "checkpointing", [*words, "train.checkpointing=true"]


def _training_words(overrides: Sequence[str]) -> list[str]:
    """Those that `lora train` would take."""
    return [word for word in overrides if not word.lstrip("+~").startswith(("plan.", "json="))]


def _same(other: TrainRun, spec: PlanRun) -> bool:
    """Whether they need the same; how fast they learn does not matter."""
    return _needed(other) == _needed(spec)


def _needed(spec: TrainRun) -> tuple[object, ...]:
    return spec.lora, spec.model, spec.train.batch_size, spec.train.checkpointing


def _show(
    spec: PlanRun,
    rows: Sequence[_Row],
    refused: Sequence[str],
    place: _Place,
    measured: Measured | None,
    screen: Screen,
) -> None:
    if spec.json:
        for row in rows:
            print(json.dumps(row.flat()))
        return
    own = rows[0].needs
    trains = own.adapter + own.whole
    screen.show(_table(rows))
    screen.line(
        f"\nparameters of the first line: {count(own.frozen)} frozen, {count(own.adapter)} in the adapter, "
        f"{count(own.whole)} trained whole ({trains / (trains + own.frozen):.2%} train)"
    )
    if measured:
        screen.line(
            f"peak of the first line and all times from {measured.steps_timed} steps on this machine: loading "
            f"{_time(measured.start_s)}, steps {_time(measured.train_s)}, scoring {_time(measured.scoring_s)}, "
            f"saving {_time(measured.saving_s)}; the other lines from these by arithmetic"
        )
    elif place.seconds is not None:
        screen.line(f"by arithmetic: 16 bits, {_BUSY:.0%} of the GPU's peak; device=fsdp: each GPU's part of a step")
    else:
        screen.line("by arithmetic; plan.measure=true or plan.gpu=NAME tells the time")
    fitting = [row.name for row in rows if row.fits]
    screen.line(f"{place.name} has {size(place.memory)}; of these fit: {', '.join(fitting) or 'none'}")
    for line in refused:
        screen.warning(line)


def _table(rows: Sequence[_Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("")
    heads = ("trains", "process", "weights", "gradients", "AdamW", "copies", "activations", "logits", "peak")
    for head in (*heads, "steps", "in all"):
        table.add_column(head, justify="right")
    table.add_column("fits")
    for row in rows:
        own = row.needs
        parts = (row.process, own.weights, own.gradients, own.optimizer, own.copies, own.activations, own.logits)
        cells = [count(own.adapter + own.whole), *map(size, (*parts, row.peak)), _time(row.train_s), _time(row.total_s)]
        table.add_row(escape(printable(row.name, 40)), *cells, "yes" if row.fits else "[red]no[/]")
    return table


def _time(seconds: float | None) -> str:
    return "–" if seconds is None else duration(seconds)
