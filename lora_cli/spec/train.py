"""Verbs that train: train, plan, resume, verify, rerun."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from lora_cli.errors import ConfigError
from lora_cli.spec.adapter import LoraSpec
from lora_cli.spec.checks import at_least, check_seed, one_of, positive
from lora_cli.spec.machine import ThreadsSpec, TrainDeviceSpec
from lora_cli.spec.model import ModelSpec
from lora_cli.spec.recipe import RecipeSpec
from lora_cli.spec.tasks import TaskSpec
from lora_cli.spec.training import SweepSpec, TrackerSpec, TrainSpec, known_batch

__all__ = [
    "PlanRun",
    "PlanSpec",
    "ProlongSpec",
    "RerunRun",
    "ResumeRun",
    "TrainRun",
    "TrustSpec",
    "VerifyRun",
    "VerifySpec",
]


@dataclass(kw_only=True)
class TrainRun:
    """lora train: fine-tune, score, write a run folder."""

    task: TaskSpec = field(default_factory=TaskSpec)
    """What is learnt."""
    model: ModelSpec = field(default_factory=ModelSpec)
    """The base model."""
    lora: LoraSpec = field(default_factory=LoraSpec)
    """The adapter."""
    train: TrainSpec = field(default_factory=TrainSpec)
    """The training."""
    device: TrainDeviceSpec = field(default_factory=TrainDeviceSpec)
    """The machine."""
    tracker: TrackerSpec = field(default_factory=TrackerSpec)
    """Further records."""
    recipe: RecipeSpec | None = None
    """Published settings for a model and the task, and the figures that they reached; what is typed besides wins."""
    sweep: SweepSpec = field(default_factory=SweepSpec)
    """What -m does with what is there already."""
    seed: int = 0
    """Seed of everything random, unless train.*_seed says otherwise."""
    resume: str = "never"
    """never: a new run; auto: continue the newest unfinished run of the same configuration, if any."""

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        one_of("resume", self.resume, ("never", "auto"), "mode")
        if self.train.metric is not None:
            one_of("train.metric", self.train.metric, [*self.task.metrics, "loss"], "metric of the task")
        if self.lora.variant == "full" and self.model.quantization != "none":
            raise ConfigError("model.quantization", self.model.quantization, "none where everything trains (lora=full)")
        if self.device.offload_base and self.model.quantization != "none":
            raise ConfigError("device.offload_base", "true", "not with model.quantization, whose layers are small")
        if self.lora.init == "loftq" and self.model.quantization == "none":
            raise ConfigError("lora.init", "loftq", "needs model.quantization=nf4 or int8")
        if self.lora.variant == "adalora" and (self.train.restore_best or self.train.patience):
            key = "restore_best" if self.train.restore_best else "patience"
            allowed = "false or null with adalora: only its last steps keep to the budget"
            raise ConfigError(f"train.{key}", getattr(self.train, key), allowed)
        if self.device.shard:
            self._check_shard()
        if self.device.compile:
            self._check_compile()

    def _check_shard(self) -> None:
        """Refuse what needs a frozen weight whole outside of its layer's turn, or trains one."""
        lora = self.lora
        refused: dict[str, tuple[object, bool]] = {
            "lora.variant": (lora.variant, lora.variant in ("full", "dora")),
            "lora.init": (lora.init, lora.init in ("pissa", "olora", "loftq")),
            "lora.bias": (lora.bias, lora.bias != "none"),
            "lora.modules_to_save": (lora.modules_to_save, bool(lora.modules_to_save)),
            "model.add_tokens": (self.model.add_tokens, bool(self.model.add_tokens)),
            "model.quantization": (self.model.quantization, self.model.quantization != "none"),
            "train.cache": (self.train.cache, self.train.cache != "off"),
            "train.logits_chunk": (self.train.logits_chunk, self.train.logits_chunk not in ("auto", "off")),
        }
        for key, (value, is_refused) in refused.items():
            if is_refused:
                raise ConfigError(key, value, "not with device.shard=true (device=fsdp); device=ddp allows it")

    def _check_compile(self) -> None:
        """Refuse what a graph of fixed shapes and steps cannot hold."""
        train, model = self.train, self.model
        refused: dict[str, tuple[object, bool]] = {
            "lora.variant": (self.lora.variant, self.lora.variant == "dylora"),
            "model.quantization": (model.quantization, model.quantization != "none"),
            "train.packing": ("true", train.packing is True),
            "train.cache": (train.cache, train.cache != "off"),
            "train.checkpointing": ("true", train.checkpointing),
            "train.batch_size": ("auto", train.batch_size == "auto"),
            "train.logits_chunk": (train.logits_chunk, train.logits_chunk not in ("auto", "off")),
            "device.shard": ("true", self.device.shard),
            "device.offload_base": ("true", self.device.offload_base),
        }
        for key, (value, is_refused) in refused.items():
            if is_refused:
                raise ConfigError(key, value, "not with device.compile=true")

    def candidates(self) -> list[TrainRun]:
        """This training with each batch size that auto can come to, smallest first; []: it is not auto."""
        whole = self.train.global_batch
        if self.train.batch_size != "auto" or whole is None:
            return []
        return [self.with_batch(size) for size in range(1, whole + 1) if whole % size == 0]

    def with_batch(self, size: int) -> TrainRun:
        """This training with so many rows per forward pass, and as many in a step as train.global_batch says.

        This is the one place where accumulation is made of the two.
        """
        assert self.train.global_batch is not None
        accumulation = self.train.global_batch // size
        train = dataclasses.replace(self.train, batch_size=size, accumulation=accumulation, memory_gib=None)
        return dataclasses.replace(self, train=train)

    @property
    def rows_per_step(self) -> int:
        """Examples per optimizer step, of all processes together."""
        return self.train.rows * self.train.accumulation

    def seed_for(self, kind: str) -> int:
        """The seed for "init", "data" or "dropout": its own key's, else the run's."""
        own = getattr(self.train, f"{kind}_seed")
        return self.seed if own is None else int(own)


@dataclass(kw_only=True)
class ProlongSpec:
    """What may change of a training that goes on."""

    max_steps: int | None = None
    """Stop after this many steps, more than before; None: as it was."""
    epochs: float | None = None
    """Passes over the training rows, more than before; None: as it was."""
    patience: int | None = None
    """Stop after this many scorings in a row without a better metric, more than before; None: as it was."""
    save_every: int | None = None
    """Write a checkpoint every so many steps; None: as it was."""
    keep: int | None = None
    """Newest checkpoints kept; None: as it was."""

    def __post_init__(self) -> None:
        if self.epochs is not None:
            positive("train.epochs", self.epochs)
        for name in ("max_steps", "patience", "save_every", "keep"):
            at_least(f"train.{name}", getattr(self, name), 1, optional=True)


@dataclass(kw_only=True)
class TrustSpec:
    """What a run cannot say of its own base model."""

    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Only from the command line, never from a run."""


@dataclass(kw_only=True)
class ResumeRun:
    """lora resume: continue a run from its own folder, or prolong it."""

    run: str = "???"
    """Run folder, unique prefix of its name, or latest: the one that was started last."""
    train: ProlongSpec = field(default_factory=ProlongSpec)
    """What may change of the training."""
    model: TrustSpec = field(default_factory=TrustSpec)
    """The base model is the run's own."""
    device: ThreadsSpec = field(default_factory=ThreadsSpec)
    """The machine."""
    tracker: TrackerSpec | None = None
    """Further records; the run's own unless given."""


@dataclass(kw_only=True)
class VerifySpec:
    """What is trained again."""

    steps: int = 20
    """Train at least so many steps again, up to the next line of metrics; 0: none."""
    start: str = "beginning"
    """beginning, or checkpoint: the last but one (train.keep=2), from which the last steps are trained again."""

    def __post_init__(self) -> None:
        at_least("verify.steps", self.steps, 0)
        one_of("verify.start", self.start, ("beginning", "checkpoint"), "start")


@dataclass(kw_only=True)
class VerifyRun:
    """lora verify: check a finished run's files, train some of it again and score it again."""

    run: str = "???"
    """Run folder, unique prefix of its name, or latest."""
    verify: VerifySpec = field(default_factory=VerifySpec)
    """What is trained again."""
    model: TrustSpec = field(default_factory=TrustSpec)
    """The base model is the run's own."""
    device: TrainDeviceSpec | None = None
    """The machine; the run's own unless given."""


@dataclass(kw_only=True)
class RerunRun:
    """lora rerun: make a run again from its own folder alone, and tell what differs."""

    run: str = "???"
    """Run folder, unique prefix of its name, or latest."""
    model: TrustSpec = field(default_factory=TrustSpec)
    """The base model is the run's own."""
    device: TrainDeviceSpec | None = None
    """The machine; the run's own unless given."""


@dataclass(kw_only=True)
class PlanSpec:
    """How a training is foretold."""

    measure: bool = True
    """Take a few real steps on this machine; false: arithmetic only, for which no weights are needed."""
    gpu: str | None = None
    """Name of a GPU, such as h100, that it is foretold for, by arithmetic; None: this machine."""
    alternatives: bool = True
    """Also foretell full fine-tuning, LoRA, QLoRA, half and twice the batch."""
    seconds: float = 15.0
    """Time that the measured steps may take, roughly."""

    def __post_init__(self) -> None:
        positive("plan.seconds", self.seconds)


@dataclass(kw_only=True)
class PlanRun(TrainRun):
    """lora plan: foretell the memory and time of a training, and of its alternatives, and what fits."""

    plan: PlanSpec = field(default_factory=PlanSpec)
    """How it is foretold."""
    json: bool = False
    """One JSON object a line instead of a table; --json is the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known_batch(self.train, "lora plan")
        if self.device.compile:
            raise ConfigError("device.compile", "true", "not with lora plan, whose steps are not compiled")
