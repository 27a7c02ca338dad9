"""Every config key: its type, its default, its help (the string beneath it), its range.

Knows nothing of Hydra, torch or files. A value is checked here once and trusted below.
`lora <verb> --help` and the configuration reference print what stands here.
"""

from __future__ import annotations

import dataclasses
import typing

from lora_cli.spec.adapter import AdaLoraSpec, LoraSpec
from lora_cli.spec.compare import BenchRun, CompareRun, CompareSpec, DiffRun, ReportRun, RunsRun, WhereSpec
from lora_cli.spec.files import CombineRun, ExportRun, FetchRun, ImportRun, InspectRun, MergeRun
from lora_cli.spec.machine import DeviceSpec, ThreadsSpec, TrainDeviceSpec
from lora_cli.spec.model import ModelSpec
from lora_cli.spec.names import (
    BASE_KEYS,
    BENCH_LAUNCHERS,
    BIASES,
    CACHES,
    CHAT_TEMPLATES,
    COMBINE_METHODS,
    DEVICES,
    EXPORT_TARGETS,
    FORMATS,
    IMPORT_FORMATS,
    INITS,
    LOSS_DOWNWARDS,
    MAX_RANK,
    MAX_SCALING,
    MAX_SEED,
    METRICS,
    OPTIMIZERS,
    PRECISIONS,
    QUANTIZATIONS,
    RUN_ORDERS,
    SCALINGS,
    SCHEDULES,
    SPLITS,
    STATUSES,
    TEXT_METRICS,
    TRACKERS,
    VARIANTS,
)
from lora_cli.spec.recipe import ExpectSpec, RecipeSpec
from lora_cli.spec.tasks import (
    TASK_KINDS,
    ChatSpec,
    ClassificationSpec,
    DataSpec,
    DecodeSpec,
    GenerationSpec,
    LanguageModelingSpec,
    TaskSpec,
    TextSpec,
)
from lora_cli.spec.train import (
    PlanRun,
    PlanSpec,
    ProlongSpec,
    RerunRun,
    ResumeRun,
    TrainRun,
    TrustSpec,
    VerifyRun,
    VerifySpec,
)
from lora_cli.spec.training import SweepSpec, TrackerSpec, TrainSpec
from lora_cli.spec.use import ChatRun, DataRun, DoctorRun, EvalRun, InferRun, RankSpec, ServeRun, ServeSpec

__all__ = [
    "BASE_KEYS",
    "BENCH_LAUNCHERS",
    "BIASES",
    "CACHES",
    "CHAT_TEMPLATES",
    "COMBINE_METHODS",
    "DEVICES",
    "EXPORT_TARGETS",
    "FORMATS",
    "IMPORT_FORMATS",
    "INITS",
    "LOSS_DOWNWARDS",
    "MAX_RANK",
    "MAX_SCALING",
    "MAX_SEED",
    "METRICS",
    "OPTIMIZERS",
    "PRECISIONS",
    "QUANTIZATIONS",
    "RUN_ORDERS",
    "SCALINGS",
    "SCHEDULES",
    "SPLITS",
    "STATUSES",
    "TASK_KINDS",
    "TEXT_METRICS",
    "TRACKERS",
    "VARIANTS",
    "VERBS",
    "AdaLoraSpec",
    "BenchRun",
    "ChatRun",
    "ChatSpec",
    "ClassificationSpec",
    "CombineRun",
    "CompareRun",
    "CompareSpec",
    "DataRun",
    "DataSpec",
    "DecodeSpec",
    "DeviceSpec",
    "DiffRun",
    "DoctorRun",
    "EvalRun",
    "ExpectSpec",
    "ExportRun",
    "FetchRun",
    "GenerationSpec",
    "ImportRun",
    "InferRun",
    "InspectRun",
    "LanguageModelingSpec",
    "LoraSpec",
    "MergeRun",
    "ModelSpec",
    "PlanRun",
    "PlanSpec",
    "ProlongSpec",
    "RankSpec",
    "RecipeSpec",
    "ReportRun",
    "RerunRun",
    "ResumeRun",
    "RunsRun",
    "ServeRun",
    "ServeSpec",
    "SweepSpec",
    "TaskSpec",
    "TextSpec",
    "ThreadsSpec",
    "TrackerSpec",
    "TrainDeviceSpec",
    "TrainRun",
    "TrainSpec",
    "TrustSpec",
    "VerifyRun",
    "VerifySpec",
    "WhereSpec",
    "all_keys",
    "nested_specs",
]

VERBS: dict[str, type] = {
    "train": TrainRun,
    "resume": ResumeRun,
    "verify": VerifyRun,
    "rerun": RerunRun,
    "eval": EvalRun,
    "infer": InferRun,
    "chat": ChatRun,
    "serve": ServeRun,
    "data": DataRun,
    "compare": CompareRun,
    "bench": BenchRun,
    "runs": RunsRun,
    "diff": DiffRun,
    "report": ReportRun,
    "merge": MergeRun,
    "inspect": InspectRun,
    "export": ExportRun,
    "import": ImportRun,
    "combine": CombineRun,
    "fetch": FetchRun,
    "doctor": DoctorRun,
    "plan": PlanRun,
}
"""Verb → the dataclass of its config; the first line of its docstring is its help."""


def nested_specs(root: type) -> list[tuple[str, list[type]]]:
    """Each field of a spec with the spec classes that can stand there (none for a plain value)."""
    hints = typing.get_type_hints(root)
    found = []
    for each in dataclasses.fields(root):
        candidates = [hints[each.name], *typing.get_args(hints[each.name])]
        schemas = [hint for hint in candidates if dataclasses.is_dataclass(hint)]
        kinds = list(TASK_KINDS.values()) if each.name == "task" and schemas else schemas
        found.append((each.name, typing.cast("list[type]", kinds)))
    return found


def all_keys(root: type, prefix: str = "") -> list[str]:
    """Dotted names of every key of a dataclass tree; a task's keys are those of all kinds."""
    keys = []
    for name, nested in nested_specs(root):
        keys.append(prefix + name)
        for schema in nested:
            keys += all_keys(schema, f"{prefix}{name}.")
    return list(dict.fromkeys(keys))
