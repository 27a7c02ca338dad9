"""Schedules against their textbook shapes, AdamW's groups against what was asked."""

import math
from itertools import pairwise

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from lora_cli.engine.device import Device
from lora_cli.engine.optim import build_optimizer, check_optimizer, rate, set_rate
from lora_cli.errors import ConfigError
from lora_cli.spec import TrainSpec


@pytest.mark.parametrize(
    ("schedule", "peer"),
    [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)],
)
def test_without_warmup_the_rate_is_the_peers(schedule, peer) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = peer(optimizer, 0, 40)
    for step in range(40):
        assert rate(step, 40, TrainSpec(schedule=schedule, warmup=0.0)) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warmup_rises_to_the_peak_and_wastes_no_step(schedule) -> None:
    spec = TrainSpec(schedule=schedule, warmup=0.1)
    rates = [rate(step, 100, spec) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert all(a < b for a, b in pairwise(rates[:11]))
    assert rates[10] == 1.0
    assert all(a >= b > 0 for a, b in pairwise(rates[10:]))


def test_warmup_can_be_said_in_steps_and_may_outlast_the_training() -> None:
    in_steps = TrainSpec(warmup=0.5, warmup_steps=10)
    assert [rate(step, 100, in_steps) for step in range(100)] == [
        rate(s, 100, TrainSpec(warmup=0.1)) for s in range(100)
    ]
    assert rate(0, 100, TrainSpec(warmup_steps=0)) == 1.0
    assert [rate(step, 2, TrainSpec(warmup_steps=9)) for step in range(2)] == [0.1, 0.2]


def test_groups_keep_their_own_rate_and_decay() -> None:
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [a], "lr": 1e-2, "weight_decay": 0.1}, {"params": [b], "lr": 1e-4, "weight_decay": 0.0}]
    optimizer = build_optimizer(groups, TrainSpec(betas=[0.8, 0.95], eps=1e-6))
    assert set_rate(optimizer, 0.5) == 5e-3
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 5e-5]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)
    assert math.isclose(optimizer.param_groups[1]["eps"], 1e-6)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_paged_adamw_takes_the_steps_of_the_plain_one() -> None:
    pytest.importorskip("bitsandbytes")
    found = []
    for name in ("adamw", "paged_adamw"):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        groups = [{"params": [parameter], "lr": 0.1, "weight_decay": 0.02}]
        optimizer = build_optimizer(groups, TrainSpec(optimizer=name, betas=[0.8, 0.95], eps=1e-6))
        for step in range(5):
            set_rate(optimizer, 1 - step / 10)
            parameter.grad = torch.sin(parameter.detach() * (step + 1))
            optimizer.step()
        found.append(parameter.detach().clone())
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "paged_adamw"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_step_counts_as_a_change_of_what_it_writes_to(name: str) -> None:
    if name == "paged_adamw":
        pytest.importorskip("bitsandbytes")
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer([{"params": [parameter], "lr": 0.1, "weight_decay": 0.0}], TrainSpec(optimizer=name))
    for _ in range(2):
        before = parameter._version
        parameter.grad = torch.ones(3)
        optimizer.step()
        assert parameter._version > before


def test_there_is_nothing_to_page_without_a_gpu() -> None:
    cpu, gpu = (Device(torch.device(name), "fp32", "") for name in ("cpu", "cuda"))
    check_optimizer("paged_adamw", gpu)
    check_optimizer("adamw", cpu)
    with pytest.raises(ConfigError, match=r"train\.optimizer=paged_adamw: needs an NVIDIA GPU"):
        check_optimizer("paged_adamw", cpu)


def test_a_step_is_torchs_to_the_last_bit() -> None:
    settings = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.1}
    spec = TrainSpec(betas=[0.9, 0.98], eps=1e-7)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 12)) for _ in range(2))
    optimizer = build_optimizer([{"params": [ours], "lr": 1e-2, "weight_decay": 0.1}], spec)
    peer = torch.optim.AdamW([theirs], **settings)
    for _ in range(3):
        for parameter, each in ((ours, optimizer), (theirs, peer)):
            (parameter**3).sum().backward()
            each.step()
            each.zero_grad()
    assert torch.equal(ours, theirs)
    assert str(optimizer.state_dict()["state"]) == str(peer.state_dict()["state"])
