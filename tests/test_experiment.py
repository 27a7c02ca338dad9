"""A configuration made real: the self-checks find what they are for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from lora_cli import experiment as experiments
from lora_cli.engine.checkpoint import Checkpoint
from lora_cli.engine.evaluate import forward
from lora_cli.errors import ConfigError, TrainingFailure, UnknownName
from lora_cli.experiment import Experiment
from lora_cli.nn import trainable_state
from lora_cli.options import conf_dir
from lora_cli.process import GentleStop
from lora_cli.spec import (
    VARIANTS,
    ClassificationSpec,
    DataSpec,
    LoraSpec,
    ModelSpec,
    TrainDeviceSpec,
    TrainRun,
    TrainSpec,
)
from lora_cli.tasks import build_task, load_splits

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
TINY = ModelSpec(name="tiny", family="bert", random={**SIZES, "num_hidden_layers": 2})
INTENTS = ClassificationSpec(
    name="support_intents", data=DataSpec(embedded="support_intents", train_limit=24, validation_limit=12)
)


UPPER = {
    "model": ModelSpec(
        name="tiny",
        family="bert",
        dropout=0.0,
        random={**SIZES, "num_hidden_layers": 3},
    ),
    "lora": LoraSpec(targets=[r"re:.*layer\.2\..*(query|value)"], dropout=0.3),
}
"""Only the last layer is adapted, and what is below drops nothing."""
ALBERT = ModelSpec(**{**vars(UPPER["model"]), "family": "albert"})
HALF = 2e-4
"""GiB for about half of what a cache would keep of the texts."""


class Notes:
    """A recorder that keeps what depends on configuration and data, and every checkpoint."""

    def __init__(self) -> None:
        self.values: list[float | None] = []
        self.checkpoints: list[Checkpoint] = []

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        self.values += values.values()

    def progress(self, *args: object) -> None:
        pass

    def scored(self, *args: object, best: bool) -> None:
        pass

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        self.checkpoints.append(copy.deepcopy(checkpoint))


def train_upper(cache: str, *, gib: float = 1.0, resume: Checkpoint | None = None) -> Notes:
    """Nine steps in three epochs, each logged."""
    spec = TrainSpec(
        epochs=3, batch_size=8, eval_batch_size=4, log_every=1, save_every=1, lr=1e-2, cache=cache, cache_gib=gib
    )
    notes = Notes()
    build(**UPPER, train=spec).train(notes, resume, GentleStop())
    return notes


def build(model: ModelSpec = TINY, **settings: object) -> Experiment:
    spec = TrainRun(task=INTENTS, model=model, **settings)
    task = build_task(spec.task)
    rows = load_splits(spec.task.data, ["train", "validation"], label="label", regression=False, seed=0)
    task.fit_labels(rows["train"])
    return Experiment.build(spec, task, rows)


@pytest.mark.parametrize(
    "lora",
    [
        LoraSpec(),
        LoraSpec(variant="dora", targets=["all-linear"]),
        LoraSpec(variant="lora_fa"),
        LoraSpec(targets=[]),
        *(LoraSpec(init=init, targets=["all-linear"]) for init in ("orthogonal", "pissa", "olora", "eva")),
        LoraSpec(variant="dora", init="pissa", scaling="alpha/sqrt(r)"),
    ],
)
def test_a_fresh_adapter_changes_nothing_and_comes_back_from_disk(lora: LoraSpec, tmp_path: Path) -> None:
    experiment = build(lora=lora)
    experiment.save(tmp_path / "adapter")
    assert set(experiment.score("validation").result()) == {"accuracy", "loss"}


def test_row_lengths_of_dora_are_those_of_the_step(tmp_path: Path) -> None:
    train = TrainSpec(batch_size=8, max_steps=6, lr=2e-2, restore_best=False)
    experiment = build(lora=LoraSpec(variant="dora", dropout=0.0), train=train)
    experiment.train(Notes(), None, GentleStop())
    # What is read back from the disk measures its rows anew.
    experiment.save(tmp_path / "adapter")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_goes_on_where_it_was_to_the_last_bit(variant: str) -> None:
    lora = LoraSpec(variant=variant, dropout=0.1) if variant != "full" else LoraSpec(variant=variant, targets=[])
    settings = {
        "lora": lora,
        "train": TrainSpec(batch_size=8, max_steps=6, save_every=1, log_every=1, lr=2e-2, restore_best=False),
    }
    whole, rest, untouched = Notes(), Notes(), build(**settings)
    untouched.train(whole, None, GentleStop())
    resumed = build(**settings)
    resumed.train(rest, whole.checkpoints[2], GentleStop())
    assert rest.values == whole.values[-len(rest.values) :]
    ends = [trainable_state(experiment.base.model) for experiment in (untouched, resumed)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


@pytest.mark.parametrize("lora", [LoraSpec(), LoraSpec(variant="full", targets=[])], ids=["lora", "full"])
@pytest.mark.parametrize("name", ["tiny-bert", "tiny-modernbert", "tiny-llama", "tiny-gpt2"])
def test_at_half_precision_all_that_trains_is_wider_and_all_checks_hold(
    name: str, lora: LoraSpec, tmp_path: Path
) -> None:
    settings = OmegaConf.to_container(OmegaConf.load(conf_dir() / "model" / f"{name}.yaml"))
    device = TrainDeviceSpec(name="cpu", precision="bf16")
    train = TrainSpec(batch_size=8, max_steps=2, restore_best=False)
    experiment = build(ModelSpec(**settings), lora=lora, device=device, train=train)
    experiment.train(Notes(), None, GentleStop())
    experiment.save(tmp_path / "adapter")


@pytest.mark.parametrize(
    "name", ["tiny-gpt2", "tiny-llama", "tiny-opt", "tiny-neox", "tiny-bloom", "tiny-t5", "tiny-bart"]
)
def test_decoders_classify_too_and_padding_changes_nothing(name: str, tmp_path: Path) -> None:
    settings = OmegaConf.to_container(OmegaConf.load(conf_dir() / "model" / f"{name}.yaml"))
    experiment = build(ModelSpec(**settings))
    experiment.save(tmp_path / "adapter")
    examples = sorted(experiment.data["train"].examples, key=lambda example: example.num_tokens)
    short, long = examples[0], examples[-1]
    assert short.num_tokens < long.num_tokens
    with torch.no_grad():
        alone = forward(experiment.base.model, experiment.task.collate([short]))[0]
        beside = forward(experiment.base.model, experiment.task.collate([short, long]))[0]
    torch.testing.assert_close(beside, alone, atol=1e-5, rtol=0)


def test_an_adapter_that_is_not_neutral_at_the_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def inject(model: torch.nn.Module, *args: object, **settings: object) -> object:
        injection = original(model, *args, **settings)
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                torch.nn.init.normal_(parameter)
        return injection

    original = experiments.inject
    monkeypatch.setattr(experiments, "inject", inject)
    with pytest.raises(TrainingFailure, match="a fresh adapter must not change the base model"):
        build()


def test_a_file_that_does_not_hold_what_was_trained_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def save_adapter(model: torch.nn.Module, injection: object, folder: Path, **settings: object) -> None:
        original(model, injection, folder, **settings)
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors["base_model.model.classifier.bias"] += 0.5
        save_file(tensors, file, metadata={"format": "pt"})

    original = experiments.save_adapter
    monkeypatch.setattr(experiments, "save_adapter", save_adapter)
    with pytest.raises(TrainingFailure, match="the saved adapter must compute what the trained one does"):
        build().save(tmp_path / "adapter")


def test_the_same_seed_makes_the_same_start_and_another_one_does_not() -> None:
    def start(**settings: object) -> dict[str, torch.Tensor]:
        model = build(**settings).base.model
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    first, again, other = start(), start(), start(train=TrainSpec(init_seed=5))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(
        torch.equal(first[name], other[name]) for name in first if name.endswith((".A", "classifier.weight"))
    )


def test_a_misspelt_layer_names_the_nearest() -> None:
    with pytest.raises(
        UnknownName, match=r"lora\.targets=qeury: no such layer\. Did you mean attention\.self\.query\?"
    ):
        build(lora=LoraSpec(targets=["qeury"]))


def test_a_rank_beyond_the_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora\.r=64"):
        build(lora=LoraSpec(r=64))


def test_texts_longer_than_the_model_can_read_are_cut_not_an_index_error() -> None:
    spec = ClassificationSpec(name="long", max_length=5000, data=INTENTS.data)
    task = build_task(spec)
    rows = load_splits(spec.data, ["train", "validation"], label="label", regression=False, seed=0)
    task.fit_labels(rows["train"])
    for row in rows["train"]:
        row["text"] = row["text"] * 200
    experiment = Experiment.build(TrainRun(task=spec, model=TINY), task, rows)
    assert experiment.data["train"].num_truncated == len(rows["train"])
    assert max(example.num_tokens for example in experiment.data["train"].examples) == experiment.base.max_length


@pytest.mark.parametrize(("cache", "gib"), [("memory", 1.0), ("disk", 1.0), ("memory", HALF)])
def test_a_training_with_a_cache_of_what_is_frozen_is_the_same_and_resumes_to_the_last_bit(
    cache: str, gib: float
) -> None:
    plain, kept = train_upper("off"), train_upper(cache, gib=gib)
    assert len(kept.values) > 30
    assert kept.values == pytest.approx(plain.values, abs=1e-6)
    resumed = train_upper(cache, gib=gib, resume=kept.checkpoints[3])
    assert resumed.values == kept.values[-len(resumed.values) :]
    last, again = kept.checkpoints[-1].trained, resumed.checkpoints[-1].trained
    assert all(torch.equal(last[name], again[name]) for name in last)


def test_a_cache_is_bounded_filled_before_the_first_step_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def training(*args: object, **settings: object) -> object:
        seen.append((experiment.cache.num_texts, experiment.cache.num_bytes))
        return original(*args, **settings)

    original = experiments.training
    monkeypatch.setattr(experiments, "training", training)
    for gib in (1.0, HALF):
        experiment = build(**UPPER, train=TrainSpec(epochs=1, eval_batch_size=4, cache="memory", cache_gib=gib))
        experiment.train(Notes(), None, GentleStop())
        assert experiment.cache.num_texts == 0
    (everything, num_bytes), (some, num_bytes_of_some) = seen
    assert everything == 24 + 12
    assert 0 < some < 24, (num_bytes, num_bytes_of_some)
    assert num_bytes_of_some <= HALF * 2**30 < num_bytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": TrainSpec(cache="memory", packing=False)}, "only where bert runs without padding"),
        ({"model": ModelSpec(**{**vars(UPPER["model"]), "dropout": None})}, "only with model.dropout=0"),
        ({"lora": LoraSpec()}, "only where the lower layers are frozen"),
        ({"model": ALBERT, "lora": LoraSpec(targets=[])}, "not with albert, one layer of which"),
        ({"lora": LoraSpec(targets=[], modules_to_save=["word_embeddings"])}, "only where the lower layers are frozen"),
    ],
)
def test_a_cache_is_refused_where_it_would_compute_something_else(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.cache=memory: {message}"):
        build(**{**UPPER, "train": TrainSpec(cache="memory"), **settings})
