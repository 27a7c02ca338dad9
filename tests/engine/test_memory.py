"""Sizes are counted from the layers' shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_cli.engine.memory import footprint
from lora_cli.nn import inject
from lora_cli.spec import LoraSpec


class Small(nn.Module):
    """A layer to adapt, a tied copy of it, and a head."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.query = nn.Linear(6, 10, dtype=dtype)
        self.head = nn.Linear(10, 3, dtype=dtype)
        self.register_buffer("positions", torch.arange(4))


def sizes(spec: LoraSpec, dtype: torch.dtype = torch.float32):
    model = Small(dtype)
    inject(model, spec, groups={}, fresh=("head",))
    return footprint(model)


def test_lora_trains_its_factors_and_the_head() -> None:
    found = sizes(LoraSpec(r=2, targets=["query"]))
    factors, head, base = 2 * 6 + 10 * 2, 10 * 3 + 3, 6 * 10 + 10
    assert found.trainable_parameters == factors + head
    assert found.total_parameters == base + factors + head
    assert found.weight_bytes == 4 * found.total_parameters + 4 * 8
    assert (found.gradient_bytes, found.optimizer_bytes) == (4 * (factors + head), 8 * (factors + head))
    assert (found.base_bytes, found.task_bytes) == (4 * base, 4 * (factors + head))
    assert found.memory_bytes == found.weight_bytes + found.gradient_bytes + found.optimizer_bytes
    assert found.storage_bytes(10) == 4 * base + 10 * 4 * (factors + head)


def test_full_fine_tuning_shares_nothing_between_tasks() -> None:
    found = sizes(LoraSpec(variant="full", targets=[]))
    assert found.base_bytes == 0
    assert found.task_bytes == 4 * found.total_parameters == found.gradient_bytes
    assert found.storage_bytes(3) == 3 * found.task_bytes


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_base_in_half_precision_halves_its_share_only(variant: str) -> None:
    spec = LoraSpec(variant=variant, r=2, targets=["query"])
    wide, narrow = sizes(spec), sizes(spec, torch.bfloat16)
    assert narrow.base_bytes == wide.base_bytes // 2
    assert narrow.task_bytes == wide.task_bytes
    assert narrow.trainable_parameters == wide.trainable_parameters


def test_a_frozen_factor_takes_no_gradient_but_is_saved() -> None:
    model = Small(torch.float32)
    inject(model, LoraSpec(r=2, targets=["query"]), groups={}, fresh=("head",))
    before = footprint(model)
    model.get_parameter("query.A").requires_grad_(False)
    after = footprint(model)
    assert after.task_bytes == before.task_bytes
    assert after.gradient_bytes == before.gradient_bytes - 4 * 2 * 6


def test_lora_fa_trains_b_only_and_is_saved_with_its_a() -> None:
    plain, frozen = (sizes(LoraSpec(variant=variant, r=2, targets=["query"])) for variant in ("lora", "lora_fa"))
    assert plain.trainable_parameters - frozen.trainable_parameters == 2 * 6
    assert frozen.gradient_bytes == 4 * frozen.trainable_parameters
    assert frozen.task_bytes == plain.task_bytes


def test_pissa_keeps_and_saves_what_it_started_from() -> None:
    plain, pissa = (sizes(LoraSpec(init=init, r=2, targets=["query"])) for init in ("kaiming", "pissa"))
    factors = 4 * (2 * 6 + 10 * 2)
    assert pissa.trainable_parameters == plain.trainable_parameters
    assert (pissa.weight_bytes, pissa.task_bytes) == (plain.weight_bytes + factors, plain.task_bytes + factors)
