"""One configuration made real: encoded data, the base model with the adapter in it, a device.

Knows the task, the model and the engine; not Hydra, nor which files a run folder holds.
"""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from lora_cli import __version__
from lora_cli.compiled import compile_forward
from lora_cli.engine.batches import by_length
from lora_cli.engine.checkpoint import Checkpoint, Progress
from lora_cli.engine.device import Device, lacks_compiler, open_device
from lora_cli.engine.evaluate import evaluate, rehearse
from lora_cli.engine.generate import generate
from lora_cli.engine.micro_step import Training, alone
from lora_cli.engine.optim import check_optimizer
from lora_cli.engine.selfcheck import check_same_logits
from lora_cli.engine.train import Objective, Recorder, Stop, training
from lora_cli.errors import ConfigError
from lora_cli.frozen_cache import FrozenCache
from lora_cli.ground import FEW, Ground, logits_of_few, run_on
from lora_cli.models import BaseModel, drawn_anew, save_config
from lora_cli.nn import (
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
from lora_cli.process import settle_down
from lora_cli.spec import LOSS_DOWNWARDS, TEXT_METRICS, TrainRun
from lora_cli.tasks import Encoded, EncodedTexts, Rows, Scorer, Task, TextScorer, TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Experiment", "score_split"]

_VERSIONS = ("torch", "transformers", "datasets", "hydra-core", "safetensors")
_READ = 128
"""Training examples from whose inputs an init can start."""


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
        ground.check_unchanged(spec.lora, base)
        if start is not None:
            start.put(base.model, injection)
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
        ground.check_unchanged(spec.lora, base)
        for parameter, start in drawn_anew(shared, seed).items():
            base.model.get_parameter(parameter).data.copy_(start)
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
            self.cache.fill(partial(run_on, self.task, self.base, each, self.device) for each in chosen)
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
        expected = logits_of_few(self.task, base, self.data["train"], self.device)
        remove(model)
        load_adapter(model, folder, fresh=base.fresh, fingerprint=self.fingerprint)
        self.settle()
        found = logits_of_few(self.task, base, self.data["train"], self.device)
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


def _compile(base: BaseModel, device: Device, longest: int) -> None:
    """Have the forward passes compiled, or tell why they are not."""
    lacking = lacks_compiler(device.device.type)
    if lacking is None:
        is_alone = device.world.size == 1
        compile_forward(base.model, pad=int(base.tokenizer.pad_token_id), longest=longest, is_alone=is_alone)
    elif device.world.rank == 0:
        warnings.warn(f"device.compile: goes on uncompiled, {lacking}", stacklevel=2)


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
    forward = partial(run_on, task, base, data.examples[:FEW], device)
    return FrozenCache(base.model, forward, kind=kind, limit=int(spec.train.cache_gib * 2**30))


def _libraries(base: BaseModel) -> tuple[str, ...]:
    """Libraries, besides those that every run uses, on which the last digits depend."""
    return ("bitsandbytes",) if base.quantized else ()


def _single_forwards(
    task: Task, base: BaseModel, data: Encoded, device: Device, seed: int
) -> Iterator[Callable[[], object]]:
    """The model on a few training examples, one by one, so that no layer is given padding."""

    @torch.no_grad()
    def run(number: int) -> None:
        run_on(task, base, [data.examples[number]], device)

    base.model.eval()
    order = torch.randperm(len(data.examples), generator=torch.Generator().manual_seed(seed))
    return (partial(run, number) for number in order[:_READ].tolist())
