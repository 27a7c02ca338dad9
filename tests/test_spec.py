"""The range of every key, on both sides of its edges."""

from __future__ import annotations

import math

import pytest

from lora_cli.errors import ConfigError, UnknownName
from lora_cli.spec import (
    MAX_RANK,
    MAX_SEED,
    TEXT_METRICS,
    VARIANTS,
    VERBS,
    ChatSpec,
    ClassificationSpec,
    DataSpec,
    DecodeSpec,
    DeviceSpec,
    EvalRun,
    FetchRun,
    GenerationSpec,
    InferRun,
    LanguageModelingSpec,
    LoraSpec,
    ModelSpec,
    TaskSpec,
    TrackerSpec,
    TrainRun,
    TrainSpec,
)

WRONG = [
    *((DataSpec, f"task.data.{split}_limit", value) for split in ("train", "validation", "test") for value in (0, -1)),
    *((DataSpec, "task.data.validation_share", value) for value in (0.0, 1.0, -0.1, math.nan)),
    *((TaskSpec, "task.max_length", value) for value in (3, 0, -1)),
    *((ClassificationSpec, "task.text", value) for value in ([], ["a", "b", "c"])),
    *((ClassificationSpec, "task.metrics", value) for value in ([], ["f2"], ["pearson"])),
    (ClassificationSpec, "task.labels", ["a", "b", "a"]),
    (ClassificationSpec, "task.choices", ["a"]),
    *((GenerationSpec, "task.metrics", value) for value in ([], ["accuracy"], ["blue"])),
    *((GenerationSpec, "task.format", value) for value in ("e2", "E2E")),
    *((GenerationSpec, "task.label_smoothing", value) for value in (-0.1, 1.0, math.nan)),
    (GenerationSpec, "task.truncate", "middle"),
    (GenerationSpec, "task.loss_on", "prompt"),
    (GenerationSpec, "task.max_target_length", 1),
    *((GenerationSpec, "task.prompt", value) for value in ("{eos}{text}", "Write:", "{eos}")),
    *((GenerationSpec, "task.target", value) for value in ("answer", "{}", "")),
    (ChatSpec, "task.template", "llama"),
    (LanguageModelingSpec, "task.metrics", ["bleu"]),
    *((DecodeSpec, f"task.decode.{name}", 0) for name in ("max_new_tokens", "num_beams", "top_k")),
    (DecodeSpec, "task.decode.no_repeat_ngram", -1),
    *((DecodeSpec, f"task.decode.{name}", 0.0) for name in ("temperature", "repetition_penalty", "top_p")),
    (DecodeSpec, "task.decode.top_p", 1.1),
    (DecodeSpec, "task.decode.length_penalty", math.inf),
    (DecodeSpec, "task.decode.stop", [""]),
    *((ModelSpec, "model.dropout", value) for value in (-0.1, 1.0, math.nan)),
    (LoraSpec, "lora.variant", "DoRA"),
    (LoraSpec, "lora.scaling", "sqrt"),
    (LoraSpec, "lora.bias", "some"),
    (LoraSpec, "lora.init", "normal"),
    *((LoraSpec, "lora.dropout", value) for value in (-0.1, 1.0, math.nan)),
    *((LoraSpec, "lora.b_lr_ratio", value) for value in (0.0, -1.0, math.nan, math.inf)),
    *((LoraSpec, "lora.r", value) for value in (0, -1, MAX_RANK + 1)),
    *((LoraSpec, "lora.alpha", value) for value in (0.0, -1.0, 1.1e4, math.nan, math.inf)),
    *((TrainSpec, "train.epochs", value) for value in (0.0, -1.0, math.nan, math.inf)),
    *((TrainSpec, f"train.{name}", 0) for name in ("max_steps", "eval_every", "save_every", "patience")),
    *((TrainSpec, f"train.{name}", 0) for name in ("batch_size", "accumulation", "eval_batch_size", "length_window")),
    *((TrainSpec, f"train.{name}", 0) for name in ("keep", "log_every")),
    *((TrainSpec, f"train.{name}", value) for name in ("lr", "head_lr", "eps") for value in (0.0, math.nan, math.inf)),
    *((TrainSpec, "train.max_grad_norm", value) for value in (0.0, math.nan)),
    (TrainSpec, "train.schedule", "cos"),
    *((TrainSpec, "train.warmup", value) for value in (-0.1, 1.0, math.nan)),
    *((TrainSpec, "train.weight_decay", value) for value in (-0.1, math.inf, math.nan)),
    *((TrainSpec, "train.betas", value) for value in ([0.9], [0.9, 1.0], [-0.1, 0.9], [0.9, math.nan])),
    *((TrainSpec, f"train.{name}_seed", value) for name in ("init", "data", "dropout") for value in (-1, MAX_SEED + 1)),
    (DeviceSpec, "device.name", "tpu"),
    (DeviceSpec, "device.precision", "int8"),
    (DeviceSpec, "device.threads", 0),
    (TrackerSpec, "tracker.name", "wandbb"),
    *((TrainRun, "seed", value) for value in (-1, MAX_SEED + 1)),
    *((TrainRun, "resume", value) for value in ("yes", "True")),
    (EvalRun, "batch_size", 0),
]


def show(value: object) -> str:
    return value.__name__ if isinstance(value, type) else str(value)


@pytest.mark.parametrize(("cls", "key", "value"), WRONG, ids=show)
def test_a_value_out_of_range_is_refused_by_its_key(cls, key, value) -> None:
    with pytest.raises(ConfigError) as caught:
        cls(**{key.rsplit(".", 1)[-1]: value})
    assert caught.value.key == key
    assert len(str(caught.value)) <= 300


RIGHT = [
    (DataSpec, "train_limit", 1),
    (TaskSpec, "max_length", 4),
    (ModelSpec, "dropout", 0.0),
    *((LoraSpec, "r", value) for value in (1, MAX_RANK)),
    (LoraSpec, "alpha", 1e4),
    (LoraSpec, "targets", []),
    (TrainSpec, "epochs", 0.5),
    (TrainSpec, "max_grad_norm", None),
    *((TrainSpec, "warmup", value) for value in (0.0, 0.99)),
    (TrainSpec, "weight_decay", 0.0),
    *((TrainRun, "seed", value) for value in (0, MAX_SEED)),
]


@pytest.mark.parametrize(("cls", "name", "value"), RIGHT, ids=show)
def test_the_edge_of_a_range_belongs_to_it(cls, name, value) -> None:
    assert getattr(cls(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("cls", "values", "keys"),
    [
        (ClassificationSpec, {"regression": True}, ["task.metrics", "task.regression"]),
        (ClassificationSpec, {"regression": True, "metrics": ["pearson"], "labels": ["a"]}, ["task.labels"]),
        (ClassificationSpec, {"regression": True, "metrics": ["pearson"], "choices": ["a", "b"]}, ["task.choices"]),
        (ModelSpec, {"random": {}}, ["model.family", "model.random"]),
        (LoraSpec, {"rank_pattern": {"query": 0}}, ["lora.rank_pattern.query"]),
        (LoraSpec, {"alpha_pattern": {"query": math.nan}}, ["lora.alpha_pattern.query"]),
        (LoraSpec, {"variant": "full", "targets": [], "b_lr_ratio": 16.0}, ["lora.b_lr_ratio", "lora.variant=full"]),
        (LoraSpec, {"variant": "lora_fa", "b_lr_ratio": 16.0}, ["lora.b_lr_ratio", "lora.variant=lora_fa"]),
        (LoraSpec, {"variant": "full", "targets": [], "init": "eva"}, ["lora.init", "lora.variant=full"]),
        (LoraSpec, {"init": "pissa", "r": MAX_RANK}, ["lora.r", "lora.init=pissa"]),
        (LoraSpec, {"init": "orthogonal", "r": 5}, ["lora.r", "lora.init=orthogonal"]),
        (DeviceSpec, {"name": "cpu", "precision": "fp16"}, ["device.precision", "device.name"]),
        (TrainRun, {"task": ClassificationSpec(), "train": TrainSpec(metric="f1")}, ["train.metric"]),
        (DecodeSpec, {"temperature": 0.5}, ["task.decode.sample", "temperature"]),
        (DecodeSpec, {"sample": True, "num_beams": 2}, ["task.decode.num_beams", "task.decode.sample"]),
        (InferRun, {"run": "x"}, ["text", "prompt", "input"]),
        (InferRun, {"run": "x", "prompt": "a", "text": "b"}, ["text", "prompt"]),
        (InferRun, {"run": "x", "prompt": "a", "output": "b"}, ["prompt", "output"]),
        (InferRun, {"run": "x", "text": "a", "input": "b"}, ["text", "input"]),
        (InferRun, {"run": "x", "input": "a", "text_pair": "b"}, ["text_pair", "text"]),
        (FetchRun, {}, ["model", "task"]),
    ],
    ids=show,
)
def test_keys_that_contradict_each_other_are_both_named(cls, values, keys) -> None:
    with pytest.raises(ConfigError) as caught:
        cls(**values)
    assert all(key in str(caught.value) for key in keys)


def test_an_unknown_name_carries_the_options() -> None:
    with pytest.raises(UnknownName) as caught:
        LoraSpec(variant="lroa")
    assert caught.value.options == sorted(VARIANTS)


@pytest.mark.parametrize("schema", VERBS.values(), ids=show)
def test_a_verb_says_what_it_does_in_one_line(schema: type) -> None:
    first = (schema.__doc__ or "").splitlines()[0]
    assert first.startswith("lora ")
    assert first.endswith(".")


def test_the_metrics_of_text_are_those_that_can_be_computed() -> None:
    from lora_cli.tasks import text

    assert set(TEXT_METRICS) == set(text.TEXT_METRICS)
