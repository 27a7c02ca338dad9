"""One configuration made real: encoded data, the base model with the adapter in it, a device.

Knows the task, the model and the engine; not Hydra, nor which files a run folder holds.
"""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from lora_cli import __version__
from lora_cli.checkpointing import checkpoint_layers, layers_of
from lora_cli.compiled import compile_forward
from lora_cli.engine.batches import by_length
from lora_cli.engine.checkpoint import Checkpoint, Progress
from lora_cli.engine.device import Device, lacks_compiler, open_device
from lora_cli.engine.evaluate import evaluate, forward, predict, rehearse
from lora_cli.engine.generate import generate
from lora_cli.engine.micro_step import Training, alone
from lora_cli.engine.offload import Streamed, move_whole
from lora_cli.engine.optim import check_optimizer
from lora_cli.engine.selfcheck import check_same_logits
from lora_cli.engine.train import Objective, Recorder, Stop, training
from lora_cli.errors import ConfigError
from lora_cli.frozen_cache import FrozenCache
from lora_cli.late_logits import can_wait, make_logits_late
from lora_cli.models import BaseModel, drawn_anew, load_base, save_config
from lora_cli.nn import (
    INITS,
    Allocator,
    Bank,
    Injection,
    Start,
    adapted_layers,
    inject,
    load_adapter,
    load_trainable_state,
    parameter_groups,
    read_adapter,
    read_start,
    remove,
    save_adapter,
    start_from_inputs,
    trainable_state,
)
from lora_cli.prepacked import prepack
from lora_cli.process import settle_down
from lora_cli.spec import LOSS_DOWNWARDS, TEXT_METRICS, TrainRun
from lora_cli.tasks import Encoded, EncodedTexts, Rows, Scorer, Task, TextScorer, TextTask
from lora_cli.unpadded import remove_padding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Experiment", "Ground", "score_split"]

_VERSIONS = ("torch", "transformers", "datasets", "hydra-core", "safetensors")
_READ = 128
"""Training examples from whose inputs an init can start."""
_CHECKED = 8
"""Examples on which self-checks compare logits."""
_CHECKED_TOKENS = 1024
"""Tokens that these have at most, unless one alone has more."""


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What several trainings can stand on: a base model that none of them changes, and data as it takes it."""

    task: Task
    rows: Mapping[str, Rows]
    data: Mapping[str, Encoded]
    base: BaseModel
    device: Device
    is_packed: bool
    """Whether the model runs without padding."""
    logits: torch.Tensor
    """Of a few examples, without any adapter."""
    settle: Callable[[], object]
    """Moves the model, or what was put into it, to where it computes."""

    @classmethod
    def lay(cls, spec: TrainRun, task: Task, rows: Mapping[str, Rows]) -> Ground:
        """Load the base model of `spec` and encode `rows`.

        Raises:
            UserError: the model or the data do not fit.
            TrainingFailure: without padding the model computes something else.
        """
        device = open_device(spec.device)
        base = load_base(
            spec.model,
            **task.head,
            seed=spec.seed_for("init"),
            dtype=device.dtype,
            device=device.device,
            keep_original=spec.lora.init == "loftq",
        )
        device.world.share_out(base.model, base.fresh, device.device, offload=spec.device.offload_base)
        settle = _at_home(spec, base, device)
        data = {split: task.encode(found, base) for split, found in rows.items()}
        is_packed = (
            spec.train.packing is not False
            and not device.compiles
            and _remove_padding(task, base, data["train"], device)
        )
        if spec.train.packing and not is_packed:
            raise ConfigError("train.packing", "true", f"not with {base.family}, whose attention needs padded texts")
        # Of weights that are split, the head's is whole only while the head itself is computed.
        is_plain = device.world.is_sharded or device.compiles
        _make_logits_late("off" if is_plain else spec.train.logits_chunk, task, base)
        # Layers whose weights come and go are computed again anyway.
        if spec.train.checkpointing and not _streams(spec):
            checkpoint_layers(base.model, base.family)
        logits = _logits(task, base, data["train"], device)
        return cls(
            task=task, rows=rows, data=data, base=base, device=device, is_packed=is_packed, logits=logits, settle=settle
        )


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a training needs, ready."""

    spec: TrainRun
    task: Task
    rows: Mapping[str, Rows]
    data: Mapping[str, Encoded]
    base: BaseModel
    injection: Injection
    fingerprint: str
    """The base model's."""
    device: Device
    settle: Callable[[], object]
    """As in `Ground`."""
    cache: FrozenCache | None
    """What the lower layers make of the texts; None: they run at every step."""
    start: Start | None = None
    """What the adapter began with, of another one (lora.init_from)."""

    @classmethod
    def build(cls, spec: TrainRun, task: Task, rows: Mapping[str, Rows]) -> Experiment:
        """Load the base model of `spec`, encode `rows` and put in an adapter that changes nothing yet.

        Raises:
            UserError: the model, the data or the adapter's settings do not fit together.
            TrainingFailure: the fresh adapter changes the base model's logits.
        """
        check_optimizer(spec.train.optimizer, open_device(spec.device))
        ground = Ground.lay(spec, task, rows)
        base, device = ground.base, ground.device
        start = _read_start(spec, task, base)
        injection = inject(
            base.model,
            spec.lora,
            groups=base.groups,
            fresh=base.fresh,
            skip=base.skip,
            new_rows=base.new_rows,
            seed=spec.seed_for("init"),
        )
        ground.settle()
        if spec.lora.init == "eva":
            forwards = _single_forwards(task, base, ground.data["train"], device, spec.seed_for("data"))
            start_from_inputs(base.model, forwards)
        _check_start(spec, ground, base)
        if start is not None:
            start.put(base.model, injection)
        prepack(base.model, limit_mib=device.prepack_mib, skip=base.fresh)
        if spec.device.compile:
            _compile(base, device, task.spec.max_length)
        settle_down()
        return cls(
            spec=spec,
            task=task,
            rows=rows,
            data=ground.data,
            base=base,
            injection=injection,
            fingerprint=base.fingerprint,
            device=device,
            settle=ground.settle,
            start=start,
            cache=_cache(spec, task, base, ground.data["train"], device, is_packed=ground.is_packed),
        )

    @classmethod
    def beside(
        cls,
        ground: Ground,
        bank: Bank,
        name: str,
        spec: TrainRun,
        *,
        rows: Mapping[str, Rows],
        data: Mapping[str, Encoded],
    ) -> Experiment:
        """A training on a base that others stand on, as the adapter called `name` of its `bank`.

        It is the one that `build` makes of `spec`, but that its model shares the base's weights.

        Raises:
            UserError: the adapter's settings do not fit, or need a model of their own.
            TrainingFailure: the fresh adapter changes the base model's logits.
        """
        check_optimizer(spec.train.optimizer, ground.device)
        shared, seed = ground.base, spec.seed_for("init")
        member = bank.add_new(
            name, spec.lora, groups=shared.groups, skip=shared.skip, new_rows=shared.new_rows, seed=seed
        )
        base = replace(shared, model=cast("PreTrainedModel", member.model))
        _check_start(spec, ground, base)
        for parameter, start in drawn_anew(shared, seed).items():
            base.model.get_parameter(parameter).data.copy_(start)
        prepack(base.model, limit_mib=ground.device.prepack_mib, skip=base.fresh)
        return cls(
            spec=spec,
            task=ground.task,
            rows=rows,
            data=data,
            base=base,
            injection=member.injection,
            fingerprint=base.fingerprint,
            device=ground.device,
            settle=lambda: member.model.to(ground.device.device),
            cache=None,
        )

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint belongs to, besides the configuration."""
        data = self.rows["train"].fingerprint + self.rows["validation"].fingerprint
        names = ("torch", "transformers", *_libraries(self.base))
        libraries = ", ".join(f"{name} {version(name)}" for name in names)
        return {
            "data": data,
            "base model": self.fingerprint,
            "device": self.device.numbers,
            "library versions": libraries,
        }

    def rehearse(self) -> None:
        """Score the longest validation batch, so that what is too large for memory fails before the first step."""
        examples, batch_size = self.data["validation"].examples, self.spec.train.eval_batch_size
        rehearse(self.base.model, self.task, examples, device=self.device, batch_size=batch_size)

    def training(
        self, recorder: Recorder, resume: Checkpoint | None, stop: Stop
    ) -> Training[tuple[Progress, Scorer | TextScorer | None]]:
        """Train, from `resume` if given, and end with the weights that the run keeps.

        Returns how far it came, and the validation split's score with just these weights if the training has it whole.

        Raises:
            TrainingFailure: see `engine.train`.
            Stopped: `stop` was asked for.
        """
        model, spec, lora = self.base.model, self.spec.train, self.spec.lora
        resume = self.device.world.from_first(resume)
        metric = spec.metric or self.task.primary_metric
        answers = metric in TEXT_METRICS
        if resume is not None:
            load_trainable_state(model, resume.trained)
        filled_s = self._fill_cache() if self.cache else 0.0
        outcome = yield from training(
            model,
            self.task,
            self.data["train"].examples,
            spec,
            groups=parameter_groups(
                model, self.injection, lr=spec.lr, head_lr=spec.head_lr or spec.lr, weight_decay=spec.weight_decay
            ),
            trained=lambda: trainable_state(model),
            score=lambda: self.score("validation", answers=answers),
            objective=Objective(metric, greater_is_better=metric not in LOSS_DOWNWARDS),
            device=self.device,
            recorder=recorder,
            data_seed=self.spec.seed_for("data"),
            dropout_seed=self.spec.seed_for("dropout"),
            resume=resume,
            method=Allocator(adapted_layers(model).values(), lora.adalora) if lora.variant == "adalora" else None,
            stop=stop,
        )
        # Part of what the steps cost, so that rows/s are those of the work.
        outcome.progress.train_s += filled_s
        if self.cache:
            self.cache.close()
        scorer = outcome.last_scorer
        if spec.restore_best and outcome.best is not None:
            load_trainable_state(model, outcome.best)
            scorer = outcome.best_scorer
        # What is kept of lower layers agrees with what they compute up to rounding, and figures are to the last digit.
        is_whole = self.cache is None and (answers or not self.task.generates)
        return outcome.progress, cast("Scorer | TextScorer", scorer) if is_whole else None

    train = alone(training)

    def _fill_cache(self) -> float:
        """Keep what the lower layers make of the texts of both splits; returns how long it took, in s."""
        assert self.cache is not None
        started = time.perf_counter()
        for split in ("train", "validation"):
            examples = self.data[split].examples
            # Always the same batches: what a text becomes depends on them in its last bits.
            batches = by_length([example.num_tokens for example in examples], self.spec.train.eval_batch_size)
            chosen = ([examples[number] for number in numbers] for numbers in batches)
            self.cache.fill(partial(_forward, self.task, self.base, each, self.device) for each in chosen)
        return time.perf_counter() - started

    def save(self, folder: Path) -> None:
        """Write the adapter, load it back from disk, and check that nothing was lost on the way.

        A model that was trained whole gets its config beside it, so that transformers can load the folder.

        Raises:
            TrainingFailure: the loaded adapter computes other logits.
        """
        model, base = self.base.model, self.base
        save_adapter(
            model,
            self.injection,
            folder,
            base_name=base.base_name,
            revision=base.revision,
            task_type=base.task_type,
            fingerprint=self.fingerprint,
            extra={
                "task": self.task.spec.name,
                "labels": list(self.task.labels) if self.task.labels else None,
                "tokens": self.spec.model.add_tokens,
                "quantization": self.spec.model.quantization,
            },
        )
        if self.spec.lora.variant == "full":
            save_config(model, folder)
        expected = _logits(self.task, base, self.data["train"], self.device)
        remove(model)
        load_adapter(model, folder, fresh=base.fresh, fingerprint=self.fingerprint)
        self.settle()
        found = _logits(self.task, base, self.data["train"], self.device)
        check_same_logits("the saved adapter must compute what the trained one does", expected, found, tolerance=0.0)

    def score(
        self, split: str, *, answers: bool = True, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Scorer | TextScorer:
        """The model as it is now on one split; see `score_split`."""
        return score_split(
            self.base.model,
            self.task,
            self.data[split],
            tokenizer=self.base.tokenizer,
            device=self.device,
            batch_size=self.spec.train.eval_batch_size,
            answers=answers,
            progress=progress,
        )

    def facts(self) -> dict[str, Any]:
        """What run.json says of a run, besides what it reached."""
        base, injection = self.base, self.injection
        return {
            "labels": list(self.task.labels) if self.task.labels else None,
            "init_from": self._start_facts(),
            "base": {
                "name": base.base_name,
                "revision": base.revision,
                "family": base.family,
                "source": base.source,
                "fingerprint": self.fingerprint,
                "quantized": base.quantized.facts() if base.quantized else None,
            },
            "data": {
                split: {
                    "rows": len(found),
                    "fingerprint": found.fingerprint,
                    "examples": len(self.data[split].examples),
                    "truncated": self.data[split].num_truncated,
                    "empty": self.data[split].num_empty,
                }
                for split, found in self.rows.items()
            },
            "targets": [
                {"pattern": row.pattern, "layers": len(row.modules), "parameters": row.num_parameters}
                for row in injection.rows
            ],
            "trained_whole": list(injection.trained_whole),
            "parameters": {
                "trainable": injection.num_trainable,
                "adapter": injection.num_adapter,
                "total": injection.num_total,
            },
            "eval_batch_size": self.spec.train.eval_batch_size,
            "packing": self.spec.train.packing is not False,
            "init_seed": self.spec.seed_for("init"),
            "data_seed": self.spec.seed_for("data"),
            "device": str(self.device),
            "versions": {"lora": __version__, "python": platform.python_version()}
            | {name: version(name) for name in (*_VERSIONS, *_libraries(base))},
        }

    def _start_facts(self) -> dict[str, Any] | None:
        if self.start is None:
            return None
        return {
            "adapter": self.spec.lora.init_from,
            "digest": self.spec.lora.init_digest,
            "task": self.start.file.extra.get("task"),
            "head": "kept" if self.start.keeps_head else "new",
        }

    def cost(self, progress: Progress) -> dict[str, float]:
        """What the training took."""
        return {
            "rows_per_s": progress.rows / max(progress.train_s, 1e-9),
            "tokens_per_s": progress.tokens / max(progress.train_s, 1e-9),
            "train_s": progress.train_s,
            "peak_memory_mib": self.device.peak_memory_mib(),
        }


def score_split(
    model: torch.nn.Module,
    task: Task,
    data: Encoded,
    *,
    tokenizer: Any,
    device: Device,
    batch_size: int,
    answers: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scorer | TextScorer:
    """A filled scorer of one split.

    Where the task's metrics need it each distinct prompt is answered, and the losses of the references are computed
    if perplexity is asked for too. With `answers` off (while training) there are losses only. `progress` is told
    (answered, of all).
    """
    answering = answers and task.generates
    scorer = task.scorer()
    if not answering or "perplexity" in task.spec.metrics:
        found = evaluate(model, task, data.examples, device=device, batch_size=batch_size)
        scorer = cast("Scorer | TextScorer", found)
    if answering:
        assert isinstance(scorer, TextScorer)
        assert isinstance(task, TextTask)
        assert isinstance(data, EncodedTexts)
        answered = generate(
            model,
            data.queries,
            task.spec.decode,
            tokenizer=tokenizer,
            device=device,
            batch_size=batch_size,
            progress=progress,
        )
        for part in device.world.gathered(list(answered)):
            for number, text in part:
                scorer.add_answer(data.queries[number], text)
    return scorer


def _read_start(spec: TrainRun, task: Task, base: BaseModel) -> Start | None:
    """What the adapter is to begin with, if with another one's end: the head too, where the labels are the same.

    Raises:
        AdapterError: that adapter is damaged, or is one of another base model.
    """
    if spec.lora.init_from is None:
        return None
    file = read_adapter(Path(spec.lora.init_from))
    labels = list(task.labels) if task.labels else None
    is_same = file.extra.get("labels") == labels
    return read_start(base.model, file, fresh=base.fresh, fingerprint=base.fingerprint, keep_head=is_same)


def _check_start(spec: TrainRun, ground: Ground, base: BaseModel) -> None:
    """See that the fresh adapter in `base` leaves the logits as they were.

    Raises:
        TrainingFailure: it does not.
    """
    # What starts at 0 adds exactly 0, and so does what is still at its start. DoRA divides by a norm and multiplies
    # by it, the identity only up to rounding; so is a product of fewer rows, and the B A of an orthogonal init.
    rounding = 1e-4 if ground.device.is_exact else 2e-2
    is_rounded = spec.lora.variant == "dora" or spec.lora.init == "orthogonal" or base.new_rows
    tolerance = rounding if is_rounded else 0.0
    # LoftQ changes it, towards the model that was quantised: layer by layer for certain, which tests hold it to.
    if INITS[spec.lora.init].is_neutral:
        after = _logits(ground.task, base, ground.data["train"], ground.device)
        check_same_logits("a fresh adapter must not change the base model", ground.logits, after, tolerance=tolerance)


def _remove_padding(task: Task, base: BaseModel, data: Encoded, device: Device) -> bool:
    """Make the model compute no padding, if its family allows it.

    Raises:
        TrainingFailure: it computes something else then.
    """
    by_length = sorted(data.examples, key=lambda example: example.num_tokens)
    batch = device.move(task.collate([by_length[min(_CHECKED, len(by_length) - 1)], *by_length[:2]]))

    def logits() -> torch.Tensor:
        with device.without_gradients(), device.autocast():
            return task.decisions(forward(base.model, batch), batch)

    padded = logits()
    if not remove_padding(base.model):
        return False
    promise = "texts laid end to end must give the logits of padded ones"
    check_same_logits(promise, padded, logits(), tolerance=1e-4 if device.is_exact else 2e-2)
    return True


def _streams(spec: TrainRun) -> bool:
    """Whether the weights of a layer are fetched by us for its turn; those that are split, by what split them."""
    return spec.device.offload_base and not spec.device.shard


def _at_home(spec: TrainRun, base: BaseModel, device: Device) -> Callable[[], object]:
    """Move the model to its device, with device.offload_base all but the weights of its layers; returns what moves it
    again after a change.
    """
    if _streams(spec):
        layers = layers_of(base.model, base.family, key="device.offload_base")
        return Streamed(base.model, layers, device.device).place
    place: Callable[[], object] = partial(base.model.to, device.device)
    if spec.device.offload_base:
        place = partial(move_whole, base.model, device.device)
    place()
    return place


def _compile(base: BaseModel, device: Device, longest: int) -> None:
    """Have the forward passes compiled, or tell why they are not."""
    lacking = lacks_compiler(device.device.type)
    if lacking is None:
        is_alone = device.world.size == 1
        compile_forward(base.model, pad=int(base.tokenizer.pad_token_id), longest=longest, is_alone=is_alone)
    elif device.world.rank == 0:
        warnings.warn(f"device.compile: goes on uncompiled, {lacking}", stacklevel=2)


def _make_logits_late(setting: str, task: Task, base: BaseModel) -> None:
    """Let the logits of large batches be computed part by part, if that is not switched off.

    Raises:
        ConfigError: a number is asked for, and there are no such logits, or the family makes them in its own way.
    """
    if isinstance(task, TextTask) and can_wait(base.model):
        if setting != "off":
            make_logits_late(base.model, setting)
    elif setting not in ("auto", "off"):
        why = (
            f"with {base.family}, whose logits are made in its own way"
            if isinstance(task, TextTask)
            else "where no words are learnt"
        )
        raise ConfigError("train.logits_chunk", setting, f"auto or off: not {why}")


def _cache(
    spec: TrainRun, task: Task, base: BaseModel, data: Encoded, device: Device, *, is_packed: bool
) -> FrozenCache | None:
    """An empty cache, if one is asked for.

    Raises:
        ConfigError: the model pads, or nothing that could be kept stays the same.
    """
    kind = spec.train.cache
    if kind == "off":
        return None
    if not is_packed:
        raise ConfigError("train.cache", kind, f"only where {base.family} runs without padding (train.packing)")
    forward = partial(_forward, task, base, data.examples[:_CHECKED], device)
    return FrozenCache(base.model, forward, kind=kind, limit=int(spec.train.cache_gib * 2**30))


def _forward(task: Task, base: BaseModel, examples: Sequence[Any], device: Device) -> None:
    """The model on a few examples."""
    batch = device.move(task.collate(examples))
    with device.autocast():
        forward(base.model, batch)


def _libraries(base: BaseModel) -> tuple[str, ...]:
    """Libraries, besides those that every run uses, on which the last digits depend."""
    return ("bitsandbytes",) if base.quantized else ()


def _single_forwards(
    task: Task, base: BaseModel, data: Encoded, device: Device, seed: int
) -> Iterator[Callable[[], object]]:
    """The model on a few training examples, one by one, so that no layer is given padding."""

    @torch.no_grad()
    def run(number: int) -> None:
        _forward(task, base, [data.examples[number]], device)

    base.model.eval()
    order = torch.randperm(len(data.examples), generator=torch.Generator().manual_seed(seed))
    return (partial(run, number) for number in order[:_READ].tolist())


def _logits(task: Task, base: BaseModel, data: Encoded, device: Device) -> torch.Tensor:
    """Logits of a few short examples, without dropout."""
    shortest = sorted(data.examples, key=lambda example: example.num_tokens)[:_CHECKED]
    # Of long texts fewer: a writing model has a logit for each word of its vocabulary and each token of theirs.
    while len(shortest) > 1 and len(shortest) * shortest[-1].num_tokens > _CHECKED_TOKENS:
        shortest.pop()
    return next(predict(base.model, task, shortest, device=device, batch_size=_CHECKED))[1]
