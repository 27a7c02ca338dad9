"""Several trainings in one process, on one base model: one import, one load, one tokenisation.

Each is the run that `lora train` makes, in a folder of its own, and owns its adapter, optimizer, schedule, metrics,
checkpoints and end. They advance micro-step by micro-step: in turns, each with a batch of its own, or mixed, with the
rows of all in one batch. One that ends or fails leaves the others as they are, and another takes its place.
"""

from __future__ import annotations

import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lora_cli.commands import train
from lora_cli.errors import INTERRUPTED, in_words
from lora_cli.late_logits import tokens_at_once
from lora_cli.process import GentleStop, gentle_stop, leave, settle_down, signals_and_warnings
from lora_cli.screen import Screen
from lora_cli.spec import TrainRun
from lora_cli.tasks import Encoded, Rows, build_task
from lora_cli.train_view import show

if TYPE_CHECKING:
    from lora_cli.engine.micro_step import Answer, MicroStep, Training
    from lora_cli.experiment import Experiment
    from lora_cli.ground import Ground

__all__ = ["Part", "common", "train_together", "why_alone", "work"]

Tell = Callable[[int, str | None], None]
"""Is told the number of a training that has ended, and why if before its time."""


@dataclass(frozen=True)
class Part:
    """One of the trainings."""

    number: int
    spec: TrainRun
    folder: Path
    overrides: tuple[str, ...]


def why_alone(spec: TrainRun) -> str | None:
    """The setting for which a training needs a model or a process of its own; None: it does not."""
    if spec.lora.variant in ("full", "dylora"):
        return f"lora.variant={spec.lora.variant}"
    if spec.lora.init in ("eva", "loftq"):
        return f"lora.init={spec.lora.init}"
    if spec.device.nproc != 1:
        return f"device.nproc={spec.device.nproc}"
    if spec.lora.init_from is not None:
        return "lora.init_from"
    if spec.train.cache != "off":
        return f"train.cache={spec.train.cache}"
    if spec.train.batch_size == "auto":
        return "train.batch_size=auto"
    for key in ("offload_base", "compile"):
        if getattr(spec.device, key):
            return f"device.{key}=true"
    if spec.tracker.name in ("wandb", "mlflow"):
        # Their libraries know one current run in a process.
        return f"tracker={spec.tracker.name}"
    return None


def common(spec: TrainRun) -> tuple[object, ...]:
    """What trainings must have in common to share a base: equal for two of them, they can."""
    # Weights that are drawn are another base with another seed; a new head is not.
    is_drawn = spec.model.random is not None or spec.model.add_tokens
    seed = spec.seed_for("init") if is_drawn else None
    train = spec.train
    shape = (train.batch_size, train.accumulation, train.packing, train.checkpointing, train.logits_chunk)
    return repr(spec.task), repr(spec.model), repr(spec.device), shape, seed


def work(parts: Sequence[Part], at_once: int, mixed: bool | None, news: Connection) -> NoReturn:
    """Be the process that trains `parts`; `news` is told (number, None or why) of each that ends."""
    code = 0
    with signals_and_warnings("lora train"):
        try:
            train_together(parts, at_once=at_once, mixed=mixed, tell=lambda *end: news.send(end))
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        except Exception as error:
            print(f"lora train: {in_words(error)}", file=sys.stderr)
            code = 1
    leave(code)


def train_together(parts: Sequence[Part], *, at_once: int, mixed: bool | None, tell: Tell) -> None:
    """Train all of them to their ends, `at_once` at a time; what each says goes to output.txt in its folder.

    `mixed` None: mixed on a GPU, which small batches leave idle, and in turns on a CPU, which they do not.

    Raises:
        LoraError: the base model or the data that they share cannot be used.
        KeyboardInterrupt: a stop was asked for; each has saved what it did.
    """
    shared = _Shared(parts[0].spec)
    if mixed is None:
        mixed = shared.ground.device.device.type != "cpu"
    # Padded to the longest row of all, attention would draw other dropout than each alone.
    mixed = mixed and shared.ground.is_packed
    # The layer that makes them part by part would be called where nobody says whose rows they are.
    mixed = mixed and parts[0].spec.train.logits_chunk in ("auto", "off")
    with gentle_stop() as stop:
        waiting, running = deque(parts), list[_Running]()
        while (waiting and not stop.is_asked) or running:
            while waiting and len(running) < at_once and not stop.is_asked:
                running.append(_Running(waiting.popleft(), shared, stop, len(parts), tell))
            running = [each for each in running if each.wants is not None]
            if mixed and len(running) > 1 and shared.holds_logits(running):
                _mixed(shared, running)
            else:
                for each in running:
                    each.take_turn()


def _mixed(shared: _Shared, running: Sequence[_Running]) -> None:
    """One batch for all that wait."""
    from lora_cli.engine.mixed_step import gradients

    steps = {each.name: each.wants for each in running if each.wants is not None}
    try:
        answers = gradients(shared.bank, steps)
    except BaseException as error:
        for each in running:
            each.fail(error)
        return
    for each in running:
        each.go_on(answers[each.name])


class _Shared:
    """What is loaded once."""

    def __init__(self, spec: TrainRun) -> None:
        from lora_cli.ground import Ground
        from lora_cli.nn import Bank

        self._rows: dict[int, tuple[Mapping[str, Rows], Mapping[str, Encoded]]] = {}
        self._task, self._logits_chunk = build_task(spec.task), spec.train.logits_chunk
        rows = train.load_splits(spec, self._task, Screen())
        self.ground: Ground = Ground.lay(spec, self._task, rows)
        base = self.ground.base
        self.bank = Bank(base.model, fresh=base.fresh, fingerprint=base.fingerprint)
        self._rows[spec.seed_for("data")] = rows, self.ground.data
        settle_down()

    def holds_logits(self, running: Sequence[_Running]) -> bool:
        """Whether the logits of all their batches may exist at the same time, by train.logits_chunk."""
        from lora_cli.engine.mixed_step import num_learnt
        from lora_cli.unpadded import takes_labels

        setting, model = self._logits_chunk, self.ground.base.model
        if setting == "off" or not takes_labels(model):
            return True
        learnt = sum(num_learnt(each.wants.batch["labels"]) for each in running if each.wants is not None)
        return learnt <= tokens_at_once(setting, model.config.vocab_size)

    def rows(self, spec: TrainRun, screen: Screen) -> tuple[Mapping[str, Rows], Mapping[str, Encoded]]:
        """The rows that a training reads, and as the model takes them: drawn by its own seed, if any are drawn."""
        seed = spec.seed_for("data")
        if seed not in self._rows:
            rows = train.load_splits(spec, self._task, screen)
            known = next((have for have in self._rows.values() if _are_same(have[0], rows)), None)
            base = self.ground.base
            data = known[1] if known else {split: self._task.encode(found, base) for split, found in rows.items()}
            self._rows[seed] = rows, data
        return self._rows[seed]


def _are_same(some: Mapping[str, Rows], others: Mapping[str, Rows]) -> bool:
    return {split: rows.fingerprint for split, rows in some.items()} == {
        split: rows.fingerprint for split, rows in others.items()
    }


class _Running:
    """A training on its way."""

    def __init__(self, part: Part, shared: _Shared, stop: GentleStop, of: int, tell: Tell) -> None:
        self._part, self._shared, self._tell = part, shared, tell
        self.name = str(part.number)
        self.wants: MicroStep | None = None
        """What it waits for; None: it has ended."""
        part.folder.mkdir(parents=True, exist_ok=True)
        self._output = (part.folder / "output.txt").open("a", encoding="utf-8", buffering=1, errors="backslashreplace")
        self._training = self._start(stop, of)
        self._advance(lambda: next(self._training))

    def take_turn(self) -> None:
        """Have its micro-step alone."""
        assert self.wants is not None
        try:
            answer = self.wants.gradients()
        except BaseException as error:
            self.fail(error)
        else:
            self.go_on(answer)

    def go_on(self, answer: Answer) -> None:
        """Its micro-step is done."""
        self._advance(lambda: self._training.send(answer))

    def fail(self, error: BaseException) -> None:
        """Its micro-step has failed."""
        self._advance(lambda: self._training.throw(error))

    def _start(self, stop: GentleStop, of: int) -> Training[float | None]:
        started, screen, part = time.perf_counter(), Screen(self._output), self._part
        screen.fact("beside", f"{of - 1} other trainings on the same base model")
        kept = train.kept_run(part.spec, part.folder)
        rows, data = self._shared.rows(part.spec, screen)

        def prepared() -> Experiment:
            from lora_cli.experiment import Experiment

            experiment = Experiment.beside(
                self._shared.ground, self._shared.bank, self.name, part.spec, rows=rows, data=data
            )
            show(screen, experiment)
            return experiment

        value = yield from train.going_on(
            part.spec,
            rows,
            prepared,
            screen,
            kept=kept,
            directory=part.folder,
            overrides=part.overrides,
            started=started,
            stopping=lambda: _obeying(stop),
            fused=of,
        )
        return value

    def _advance(self, go: Callable[[], MicroStep]) -> None:
        """Let it go on to its next request, or its end."""
        try:
            self.wants = go()
            return
        except StopIteration:
            why = None
        except KeyboardInterrupt:
            why = INTERRUPTED
        except Exception as error:
            why = in_words(error)
        self.wants = None
        if self.name in self._shared.bank.names:
            self._shared.bank.remove(self.name)
        with self._output as output:
            if why is not None:
                output.write(f"lora train: {why}\n")
        self._tell(self._part.number, why)


@contextmanager
def _obeying(stop: GentleStop) -> Iterator[GentleStop]:
    """`stop`, which others heed as well, for one training."""
    yield stop
    stop.take_effect()
