"""The training: the keys of train.*, tracker.* and sweep.*."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from lora_cli.errors import ConfigError
from lora_cli.spec.checks import at_least, check_seed, one_of, positive, share
from lora_cli.spec.names import CACHES, OPTIMIZERS, SCHEDULES, TRACKERS

__all__ = ["SweepSpec", "TrackerSpec", "TrainSpec", "known_batch"]


@dataclass(kw_only=True)
class TrainSpec:
    """How it is learnt."""

    epochs: float = 3.0
    """Passes over the training rows; fractions are allowed."""
    max_steps: int | None = None
    """Stop after this many optimizer steps; None: after `epochs`."""
    batch_size: int | str = 32
    """Examples per forward pass; auto: the largest divisor of train.global_batch that fits into memory, found by
    trying, and kept in the run's configuration."""
    accumulation: int = 1
    """Forward passes per optimizer step; the loss is averaged over all of their targets."""
    global_batch: int | None = None
    """Examples per optimizer step: batch_size times accumulation, which follows from it where batch_size is auto."""
    memory_gib: float | None = None
    """What a training with batch_size=auto may take, in GiB; None: nine tenths of what is free."""
    eval_batch_size: int = 64
    """Examples per forward pass when scoring."""
    packing: bool | None = None
    """Compute no padding: the texts of a batch run end to end, and none sees another. None: where the model's family
    allows it; true: refuse one that does not; false: pad."""
    checkpointing: bool = False
    """Keep of each layer its input alone for the backward pass and compute the layer again there: the same losses, less
    memory, one more forward pass."""
    logits_chunk: str = "auto"
    """Tokens whose logits exist at the same time where words are learnt; those of a larger batch are computed part by
    part, and once more in the backward pass. auto: so many that they take 128 MiB, but all of a batch
    that several trainings share (hydra/launcher=fused); with a number those take turns. off: always all."""
    cache: str = "off"
    """Where the input of the first layer that trains is kept for later epochs, if all below it is frozen and drops
    nothing out (model.dropout=0): off, memory, or disk (the system's temporary folder)."""
    cache_gib: float = 2.0
    """At most so much is kept, in GiB; of texts beyond it the lower layers run again."""
    length_window: int = 32
    """Batches among which shuffled examples are sorted by length, to save padding; 1: none."""
    lr: float = 5e-4
    """Peak learning rate."""
    head_lr: float | None = None
    """Peak learning rate of modules that train whole; None: `lr`."""
    schedule: str = "linear"
    """Learning rate after the warm-up: linear or cosine to 0, or constant."""
    warmup: float = 0.06
    """Share of all steps over which the learning rate rises from 0."""
    warmup_steps: int | None = None
    """Number of these steps; None: `warmup` says their share."""
    optimizer: str = "adamw"
    """adamw, or paged_adamw (bitsandbytes): its states move to the host where a CUDA device's memory runs out."""
    weight_decay: float = 0.0
    """Decoupled weight decay of all trained matrices (biases and norms have none)."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's two decay rates."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient to this norm; None: no clipping."""
    eval_every: int | None = None
    """Score the validation split every so many steps; None: after each epoch."""
    save_every: int | None = None
    """Write a checkpoint every so many steps; None: whenever the validation split is scored."""
    keep: int = 1
    """Newest checkpoints kept."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    patience: int | None = None
    """Stop after this many scorings in a row without a better metric; None: never."""
    metric: str | None = None
    """Metric that chooses the best checkpoint; None: the task's first, or the loss where text is generated."""
    restore_best: bool = True
    """End with the best checkpoint's weights, not with the last's."""
    init_seed: int | None = None
    """Seed of A and of the fresh head; None: `seed`."""
    data_seed: int | None = None
    """Seed of the order of examples and of drawn subsets; None: `seed`."""
    dropout_seed: int | None = None
    """Seed of dropout; None: `seed`."""

    def __post_init__(self) -> None:
        positive("train.epochs", self.epochs)
        for name in ("max_steps", "eval_every", "save_every", "patience"):
            at_least(f"train.{name}", getattr(self, name), 1, optional=True)
        one_of("train.optimizer", self.optimizer, OPTIMIZERS, "optimizer")
        one_of("train.cache", self.cache, CACHES, "place")
        positive("train.cache_gib", self.cache_gib)
        if self.logits_chunk not in ("auto", "off") and not re.fullmatch("[1-9][0-9]*", self.logits_chunk, re.ASCII):
            raise ConfigError("train.logits_chunk", self.logits_chunk, "auto, off, or a number of tokens, 1 or more")
        for name in ("accumulation", "eval_batch_size", "length_window", "keep", "log_every"):
            at_least(f"train.{name}", getattr(self, name), 1)
        self._check_batch()
        positive("train.lr", self.lr)
        if self.head_lr is not None:
            positive("train.head_lr", self.head_lr)
        positive("train.eps", self.eps)
        if self.max_grad_norm is not None:
            positive("train.max_grad_norm", self.max_grad_norm)
        one_of("train.schedule", self.schedule, SCHEDULES, "schedule")
        share("train.warmup", self.warmup)
        at_least("train.warmup_steps", self.warmup_steps, 0, optional=True)
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError("train.weight_decay", self.weight_decay, "0 or more")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("train.betas", self.betas, "two numbers from 0 up to, not including, 1")
        for name in ("init_seed", "data_seed", "dropout_seed"):
            check_seed(f"train.{name}", getattr(self, name), optional=True)

    @property
    def rows(self) -> int:
        """Examples per forward pass, once they are known."""
        assert isinstance(self.batch_size, int), "settled before anything is built"
        return self.batch_size

    def _check_batch(self) -> None:
        at_least("train.global_batch", self.global_batch, 1, optional=True)
        if self.memory_gib is not None:
            positive("train.memory_gib", self.memory_gib)
            if self.batch_size != "auto":
                raise ConfigError("train.memory_gib", self.memory_gib, "null without train.batch_size=auto")
        if isinstance(self.batch_size, int):
            at_least("train.batch_size", self.batch_size, 1)
            product = self.batch_size * self.accumulation
            if self.global_batch not in (None, product):
                allowed = f"{product}, which is train.batch_size × train.accumulation; or train.batch_size=auto"
                raise ConfigError("train.global_batch", self.global_batch, allowed)
        elif self.batch_size != "auto":
            raise ConfigError("train.batch_size", self.batch_size, "auto, or a whole number, 1 or more")
        elif self.global_batch is None:
            raise ConfigError("train.global_batch", None, "a number of rows, with train.batch_size=auto")
        elif self.accumulation != 1:
            raise ConfigError("train.accumulation", self.accumulation, "not with train.batch_size=auto, which sets it")


@dataclass(kw_only=True)
class TrackerSpec:
    """Where else metrics go, besides the run folder."""

    name: str = "none"
    """none, tensorboard, wandb or mlflow."""
    project: str = "lora"
    """Project (wandb) or experiment (mlflow)."""

    def __post_init__(self) -> None:
        one_of("tracker.name", self.name, TRACKERS, "tracker")


@dataclass(kw_only=True)
class SweepSpec:
    """What a sweep (-m) does with what is there already."""

    redo: str = "missing"
    """missing: train only what is not finished yet, in this sweep or elsewhere under runs/; all: train everything."""

    def __post_init__(self) -> None:
        one_of("sweep.redo", self.redo, ("missing", "all"), "choice")


def known_batch(train: TrainSpec, verb: str) -> None:
    """Refuse train.batch_size=auto where nothing is trained to find what it comes to."""
    if train.batch_size == "auto":
        raise ConfigError("train.batch_size", "auto", f"a number for {verb}; lora train alone tries what fits")
