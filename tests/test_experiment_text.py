"""Written text through a whole experiment: accumulation, and which models may pack their texts."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_cli import row_attention
from lora_cli.engine.device import open_device
from lora_cli.engine.train import Objective, train
from lora_cli.errors import ConfigError, TrainingFailure
from lora_cli.experiment import Experiment
from lora_cli.nn import parameter_groups, trainable_state
from lora_cli.process import GentleStop
from lora_cli.spec import (
    DataSpec,
    DeviceSpec,
    GenerationSpec,
    LoraSpec,
    ModelSpec,
    TrainDeviceSpec,
    TrainRun,
    TrainSpec,
)
from lora_cli.tasks import build_task, load_splits
from lora_cli.unpadded import takes_labels
from nn.models import LM_CONFIGS

DATA = DataSpec(embedded="support_intents", train_limit=48, validation_limit=4)
TASK = GenerationSpec(
    name="intents", data=DATA, prompt="{label}:", target="{text}", max_length=40, max_target_length=200
)
LORA = LoraSpec(r=2, targets=["all-linear"])


def build(
    family: str, *, lora: LoraSpec | None = None, device: TrainDeviceSpec | None = None, **settings: object
) -> Experiment:
    random = LM_CONFIGS[family] | {
        key: 400 for key in ("n_positions", "max_position_embeddings") if key in LM_CONFIGS[family]
    }
    random |= {"decoder_start_token_id": 0} if family == "t5" else {}
    task, model = build_task(TASK), ModelSpec(name="tiny", family=family, random=random, dropout=0.0)
    rows = load_splits(DATA, ["train", "validation"], label=None, regression=False, seed=0)
    usual = LORA if family != "bloom" else LoraSpec(r=2)
    spec = TrainRun(
        task=TASK, model=model, lora=lora or usual, device=device or TrainDeviceSpec(), train=TrainSpec(**settings)
    )
    return Experiment.build(spec, task, rows)


class Silent:
    def metrics(self, step, values) -> None:
        self.last = values

    def progress(self, progress, total, loss, lr) -> None:
        pass

    def scored(self, step, metrics, *, best) -> None:
        pass

    def checkpoint(self, checkpoint) -> None:
        pass


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "opt"])
def test_at_half_precision_a_model_trains_whole(family: str, tmp_path: Path) -> None:
    settings = {"batch_size": 4, "max_steps": 2, "restore_best": False}
    device = TrainDeviceSpec(name="cpu", precision="bf16")
    experiment = build(family, lora=LoraSpec(variant="full", targets=[]), device=device, **settings)
    assert takes_labels(experiment.base.model)
    experiment.train(Silent(), None, GentleStop())
    experiment.save(tmp_path / "adapter")


@pytest.mark.parametrize("variant", ["lora", "full"])
def test_a_fresh_adapter_changes_nothing_where_kernels_round_otherwise(variant: str) -> None:
    # Wide enough for products of few tokens by a copy of the weight to differ from those by the weight.
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4}
    data = DataSpec(embedded="support_intents", train_limit=2, validation_limit=2)
    task = GenerationSpec(name="intents", data=data, prompt="{label}:", target="{text}", max_target_length=12)
    rows = load_splits(data, ["train", "validation"], label=None, regression=False, seed=0)
    model = ModelSpec(name="wide", family="llama", random={**sizes, "vocab_size": 400})
    lora = LORA if variant == "lora" else LoraSpec(variant="full", targets=[])
    Experiment.build(TrainRun(task=task, model=model, lora=lora, train=TrainSpec()), build_task(task), rows)


def after_a_step(experiment: Experiment, **settings: object) -> dict[str, torch.Tensor]:
    """What trains, after a step in double precision; by its large epsilon Adam's step is the gradient's."""
    model = copy.deepcopy(experiment.base.model).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).double()
    spec = TrainSpec(
        max_steps=1, eps=1e3, lr=10.0, warmup=0.0, length_window=1, log_every=1, max_grad_norm=None, **settings
    )
    train(
        model,
        experiment.task,
        experiment.data["train"].examples,
        spec,
        groups=parameter_groups(model, experiment.injection, lr=spec.lr, head_lr=None, weight_decay=0.0),
        trained=lambda: trainable_state(model),
        score=lambda: SimpleNamespace(result=lambda: {"loss": None}),
        objective=Objective("loss", greater_is_better=False),
        device=open_device(DeviceSpec(name="cpu")),
        recorder=Silent(),
        data_seed=0,
        dropout_seed=0,
    )
    return {name: tensor.clone() for name, tensor in trainable_state(model).items()}


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_four_accumulated_batches_are_one_big_batch(family: str) -> None:
    experiment = build(family)
    assert len({example.num_targets for example in experiment.data["train"].examples}) > 8
    big, small = after_a_step(experiment, batch_size=48), after_a_step(experiment, batch_size=12, accumulation=4)
    start = trainable_state(experiment.base.model)
    assert any((big[name] - start[name]).abs().max() > 1e-4 for name in big if name.endswith(".A"))
    for name in big:
        torch.testing.assert_close(small[name], big[name], rtol=1e-6, atol=1e-8)


def test_a_packed_step_is_the_padded_one() -> None:
    padded, packed = (after_a_step(build("llama", packing=packing), batch_size=48) for packing in (False, True))
    for name in padded:
        torch.testing.assert_close(packed[name], padded[name], rtol=1e-6, atol=1e-8)


def test_a_model_that_sees_its_neighbours_when_packed_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_attention, "_PER_GROUP", {"cpu": 10**9})
    monkeypatch.setattr(row_attention, "_blocked", lambda group, window, **_: None)
    with pytest.raises(TrainingFailure, match="laid end to end must give the logits of padded ones"):
        build("llama")


@pytest.mark.parametrize("family", ["bloom", "falcon", "gemma2", "t5", "bart"])
def test_models_that_cannot_be_packed_are_refused_by_name_or_padded(family: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^train\.packing=true: not with {family}, whose attention needs padded texts$"
    ):
        build(family, packing=True)
    assert not takes_labels(build(family).base.model)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi", "qwen2", "gemma", "mistral"])
def test_models_that_keep_them_apart_are_not_and_nobody_gives_advice(family: str) -> None:
    logger = logging.getLogger("transformers")
    handler, level, said = logging.Handler(), logger.level, []
    handler.emit = said.append
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        experiment = build(family, packing=True)
        after_a_step(experiment, batch_size=48)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert [record.getMessage() for record in said] == []
