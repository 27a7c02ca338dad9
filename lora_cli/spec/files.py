"""Verbs that turn adapters and models into files: merge, inspect, export, import, combine, fetch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from lora_cli.errors import ConfigError
from lora_cli.spec.checks import at_least, one_of
from lora_cli.spec.machine import DeviceSpec
from lora_cli.spec.model import ModelSpec
from lora_cli.spec.names import BASE_KEYS, COMBINE_METHODS, EXPORT_TARGETS, IMPORT_FORMATS, MAX_RANK, MAX_SCALING
from lora_cli.spec.tasks import TaskSpec
from lora_cli.spec.use import RankSpec

__all__ = ["CombineRun", "ExportRun", "FetchRun", "ImportRun", "InspectRun", "MergeRun"]


@dataclass(kw_only=True)
class MergeRun:
    """lora merge: write a plain model with a saved run's adapter merged into its weights."""

    run: str = "???"
    """Run folder, unique prefix of its name, latest, or an adapter folder in PEFT format."""
    output: str = "???"
    """Folder to write; it must not exist yet."""
    dtype: str = "fp32"
    """How the weights are stored: fp32, bf16 or fp16."""
    shard_size: str = "5GB"
    """Largest weight file."""
    rows: int = 64
    """Rows of task.split on which merged and adapted model are compared; 0: no comparison."""
    task: TaskSpec = field(default_factory=TaskSpec)
    """The task; the run's own unless given."""
    model: ModelSpec = field(default_factory=ModelSpec)
    """The base model; the run's own unless given."""
    lora: RankSpec = field(default_factory=RankSpec)
    """Which rank is used."""
    device: DeviceSpec = field(default_factory=DeviceSpec)
    """The machine."""
    force_base: bool = False
    """Use the adapter even if the base model's fingerprint is not the one it was trained on."""

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, ("fp32", "bf16", "fp16"), "dtype")
        at_least("rows", self.rows, 0)
        if not re.fullmatch(r"[1-9][0-9]*(MB|GB)", self.shard_size):
            raise ConfigError("shard_size", self.shard_size, "a size such as 500MB or 5GB")


@dataclass(kw_only=True)
class InspectRun:
    """lora inspect: how much of its rank a saved adapter uses, layer by layer."""

    run: str = "???"
    """Run folder, unique prefix of its name, latest, or an adapter folder in PEFT format."""
    energy: float = 0.9
    """Share of each update's squared norm that the suggested rank keeps."""
    output: str | None = None
    """JSON file for all singular values and the suggested ranks."""
    plot: str | None = None
    """SVG file for the energy that each rank keeps."""

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise ConfigError("energy", self.energy, "a share above 0, at most 1")


@dataclass(kw_only=True)
class ExportRun:
    """lora export: write a saved adapter as another program wants it, with what each one makes of it."""

    run: str = "???"
    """Run folder, unique prefix of its name, latest, or an adapter folder in PEFT format."""
    target: str = "???"
    """Program that is to load it: peft, vllm, sglang, tgi, lorax, llamacpp, loralib, or onnx (the whole model)."""
    lora: RankSpec = field(default_factory=RankSpec)
    """Which rank is used."""
    output: str = "???"
    """Folder to write; it must not exist yet."""
    rows: int = 64
    """Rows of task.split on which onnxruntime and torch are compared (target=onnx); 0: no comparison."""
    task: TaskSpec | None = None
    """The task (target=onnx); the run's own unless given."""
    model: ModelSpec | None = None
    """The base model (target=onnx and llamacpp); the run's own unless given."""
    force_base: bool = False
    """Use the adapter even if the base model's fingerprint is not the one it was trained on (target=onnx)."""

    def __post_init__(self) -> None:
        one_of("target", self.target, EXPORT_TARGETS, "target")
        at_least("rows", self.rows, 0)
        groups = {"task": self.task and self.task.name, "model": self.model and self.model.name}
        given = {key: value for key, value in {**groups, "force_base": self.force_base}.items() if value}
        for key, value in given.items():
            if key not in BASE_KEYS.get(self.target, ()):
                raise ConfigError(key, value, f"target={self.target} does not look at it")


@dataclass(kw_only=True)
class ImportRun:
    """lora import: take over an adapter of PEFT (pickled), loralib or torchtune."""

    source: str = "???"
    """File, or folder with adapter_config.json and a weights file."""
    output: str = "???"
    """Adapter folder to write; it must not exist yet."""
    format: str = "auto"
    """auto (by the names of the tensors), peft, loralib or torchtune."""
    model: ModelSpec | None = None
    """The base model, whose config tells what its layers are; needed for loralib and torchtune."""
    task_type: str | None = None
    """What the model is for: SEQ_CLS, CAUSAL_LM or SEQ_2_SEQ_LM; needed with model."""
    alpha: float | None = None
    """Numerator of the scaling, which files of loralib and torchtune do not hold."""
    enable_lora: list[bool] = field(default_factory=list)
    """What loralib's MergedLinear was given, such as [true,false,true]; []: there is none."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules in a loralib file that were trained whole, such as [classifier]."""

    def __post_init__(self) -> None:
        one_of("format", self.format, IMPORT_FORMATS, "format")
        if self.task_type is not None:
            one_of("task_type", self.task_type, ("SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM"), "task type")
        if (self.model is None) != (self.task_type is None):
            key = "model" if self.model is None else "task_type"
            raise ConfigError(key, "", "model=NAME and task_type=SEQ_CLS, CAUSAL_LM or SEQ_2_SEQ_LM go together")
        if self.alpha is not None and not 0 < self.alpha <= MAX_SCALING:
            raise ConfigError("alpha", self.alpha, f"a number above 0, at most {MAX_SCALING:g}")


@dataclass(kw_only=True)
class CombineRun:
    """lora combine: add, subtract, scale or interpolate saved adapters."""

    adapters: list[str] = field(default_factory=list)
    """Runs or adapter folders, as run= takes them."""
    weights: list[float] = field(default_factory=list)
    """One for each adapter, negative to subtract; []: 1 each."""
    method: str = "concat"
    """concat (the exact sum; ranks add up), svd (the best update of `rank` to the sum) or linear (factors mixed)."""
    rank: int | None = None
    """Rank with method=svd; None: what the sum needs."""
    head: int | None = None
    """Number of the adapter, from 1, whose head, biases and label names are taken; None: they must be equal."""
    output: str = "???"
    """Adapter folder to write; it must not exist yet."""
    force_base: bool = False
    """Combine adapters even if they were trained on different base models."""

    def __post_init__(self) -> None:
        one_of("method", self.method, COMBINE_METHODS, "method")
        if not self.adapters:
            raise ConfigError("adapters", "[]", "one run or more, such as [runs/a,runs/b]")
        if self.weights and len(self.weights) != len(self.adapters):
            raise ConfigError("weights", self.weights, f"one for each of the {len(self.adapters)} adapters")
        if not all(math.isfinite(weight) and abs(weight) <= MAX_SCALING for weight in self.weights):
            raise ConfigError("weights", self.weights, f"finite numbers, at most {MAX_SCALING:g} in size")
        if self.rank is not None and (self.method != "svd" or not 1 <= self.rank <= MAX_RANK):
            raise ConfigError("rank", self.rank, f"a whole number from 1 to {MAX_RANK}, with method=svd")
        if self.head is not None and not 1 <= self.head <= len(self.adapters):
            raise ConfigError("head", self.head, f"the number of an adapter, from 1 to {len(self.adapters)}")


@dataclass(kw_only=True)
class FetchRun:
    """lora fetch: download a model and a data set for use offline."""

    task: TaskSpec | None = None
    """Task whose data set is fetched."""
    model: ModelSpec | None = None
    """Model that is fetched."""

    def __post_init__(self) -> None:
        if self.task is None and self.model is None:
            raise ConfigError("model", "", "give model=NAME, task=NAME or both")
