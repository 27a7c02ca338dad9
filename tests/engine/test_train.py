"""The loop: normalisation, resume, early stopping, refusal of numbers that are none."""

from __future__ import annotations

import copy

import pytest
import torch

from engine.tiny import Bag, Item, Letters, items
from lora_cli.engine.device import open_device
from lora_cli.engine.evaluate import evaluate
from lora_cli.engine.train import Objective, Outcome, train
from lora_cli.errors import TrainingFailure
from lora_cli.spec import DeviceSpec, TrainSpec


class Notes:
    """A recorder that keeps everything."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict]] = []
        self.checkpoints = []

    def metrics(self, step, values) -> None:
        self.rows.append((step, dict(values)))

    def scored(self, step, metrics, *, best) -> None:
        pass

    def progress(self, progress, total, loss, lr) -> None:
        pass

    def checkpoint(self, checkpoint) -> None:
        self.checkpoints.append(copy.deepcopy(checkpoint))

    def losses(self) -> list[float]:
        return [values["train/loss"] for _, values in self.rows if "train/loss" in values]


@pytest.fixture
def model() -> Bag:
    torch.manual_seed(0)
    return Bag(dropout=0.3)


def run(
    model: Bag, spec: TrainSpec, *, data: list[Item] | None = None, resume=None, notes=None, task=None, **more
) -> tuple[Outcome, Notes]:
    notes, device = notes or Notes(), open_device(DeviceSpec(name="cpu"))
    if resume is not None:
        model.load_state_dict(resume.trained, strict=False)
    outcome = train(
        model,
        task or Letters(),
        data or items(),
        spec,
        groups=[{"params": list(model.head.parameters()), "lr": spec.lr, "weight_decay": spec.weight_decay}],
        trained=lambda: {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad},
        score=lambda: evaluate(model, Letters(), items(20, seed=9), device=device, batch_size=8),
        objective=Objective("accuracy", greater_is_better=True),
        device=device,
        recorder=notes,
        data_seed=1,
        dropout_seed=2,
        resume=resume,
        **more,
    )
    return outcome, notes


@pytest.mark.parametrize("accumulation", [2, 3, 4])
def test_accumulated_batches_equal_one_big_batch(model: Bag, accumulation: int) -> None:
    model.dropout.p = 0.0
    big, small = copy.deepcopy(model), copy.deepcopy(model)
    common = {"epochs": 2, "lr": 1e-2, "length_window": 1, "log_every": 1}
    _, expected = run(big, TrainSpec(batch_size=4 * accumulation, **common))
    _, found = run(small, TrainSpec(batch_size=4, accumulation=accumulation, **common))
    assert found.losses() == pytest.approx(expected.losses(), abs=1e-6)
    torch.testing.assert_close(small.head.weight, big.head.weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_resumed_training_equals_the_uninterrupted_one_to_the_last_bit(model: Bag, schedule: str, stop: int) -> None:
    spec = TrainSpec(
        epochs=3, batch_size=6, accumulation=2, lr=1e-2, schedule=schedule, save_every=3, eval_every=4, log_every=2
    )
    whole, again = copy.deepcopy(model), copy.deepcopy(model)
    outcome, notes = run(whole, spec)
    checkpoint = notes.checkpoints[stop] if stop else None
    resumed, rest = run(again, spec, resume=checkpoint)
    at = checkpoint.progress.step if checkpoint else 0
    assert rest.rows == [(step, values) for step, values in notes.rows if step > at]
    assert torch.equal(again.head.weight, whole.head.weight)
    assert all(torch.equal(resumed.best[name], tensor) for name, tensor in outcome.best.items())


def test_scoring_more_often_does_not_change_the_training(model: Bag) -> None:
    rare, often = copy.deepcopy(model), copy.deepcopy(model)
    run(rare, TrainSpec(epochs=2, batch_size=8))
    run(often, TrainSpec(epochs=2, batch_size=8, eval_every=1))
    assert torch.equal(rare.head.weight, often.head.weight)


def test_training_stops_when_patience_runs_out_and_knows_the_best_step(model: Bag) -> None:
    outcome, notes = run(model, TrainSpec(epochs=50, batch_size=10, lr=1e-6, eval_every=1, patience=3))
    assert outcome.progress.stopped_early
    assert outcome.progress.step == outcome.progress.best_step + 3
    assert notes.checkpoints[-1].progress.stopped_early


def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched(model: Bag) -> None:
    model.embedding.weight.data[7] = float("nan")
    data = [Item((1, 2), 0)] * 8 + [Item((7,), 1)]
    with pytest.raises(TrainingFailure, match=r"step \d+: loss nan at learning rate"):
        run(model, TrainSpec(epochs=5, batch_size=3, lr=1e-2), data=data)
    assert model.head.weight.isfinite().all()


def test_a_frozen_tensor_that_moves_is_an_error(model: Bag) -> None:
    class Careless(Letters):
        def loss(self, logits, batch):
            model.embedding.weight.data.add_(0.1)
            model.embedding.weight.mul_(1.0)
            return super().loss(logits, batch)

    device = open_device(DeviceSpec(name="cpu"))
    with pytest.raises(TrainingFailure, match=r"embedding\.weight is frozen but changed"):
        train(
            model,
            Careless(),
            items(),
            TrainSpec(batch_size=8),
            groups=[{"params": list(model.head.parameters()), "lr": 0.1, "weight_decay": 0.0}],
            trained=dict,
            score=Letters().scorer,
            objective=Objective("accuracy", greater_is_better=True),
            device=device,
            recorder=Notes(),
            data_seed=0,
            dropout_seed=0,
        )


def test_a_tensor_that_should_train_but_cannot_is_an_error(model: Bag) -> None:
    model.spare = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(TrainingFailure, match="spare should train but did not move"):
        run(model, TrainSpec(batch_size=8))


@pytest.mark.parametrize(
    ("value", "best", "greater", "better"),
    [(0.5, None, True, True), (0.5, 0.5, True, False), (0.4, 0.5, False, True), (None, 0.1, True, False)],
)
def test_what_counts_as_better(value, best, greater, better) -> None:
    assert Objective("m", greater).improves(value, best) is better
