"""Dropout by a draw for four: what it promises is torch's, but for which elements are dropped."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_cli.dropout import Streams, dropout, of_block, quicken, unseen


@given(p=st.floats(0.0, 1.0), size=st.integers(0, 40), seed=st.integers(0, 9))
@settings(deadline=None)
def test_an_element_is_zero_or_divided_by_what_is_left(p: float, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(size, 3, dtype=torch.float64)
    y = dropout(x, p)
    left = 1 - round(p * 65536) / 65536
    for before, after in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True):
        assert after == 0 or after == pytest.approx(before / left, rel=1e-12)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_asked_for_and_independently(p: float) -> None:
    torch.manual_seed(0)
    gone = (dropout(torch.ones(1_000_003), p) == 0).double()
    deviation = (p * (1 - p) / len(gone)) ** 0.5
    assert abs(gone.mean() - p) < 5 * deviation + 2**-17
    # Neighbours, of which four share a draw, must not know of each other.
    for distance in range(1, 5):
        together = (gone[distance:] * gone[:-distance]).mean()
        assert abs(together - p * p) < 5 * (p * p * (1 - p * p) / len(gone)) ** 0.5 + 2**-16


def test_the_gradient_passes_where_the_value_did() -> None:
    torch.manual_seed(1)
    x = torch.randn(7, 5).T.requires_grad_()  # not contiguous
    y = dropout(x, 0.3)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient * x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_seed_decides_and_the_dtype_stays(dtype: torch.dtype) -> None:
    x = torch.ones(33, dtype=dtype)
    torch.manual_seed(5)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(5)
    assert torch.equal(dropout(x, 0.5), first)
    assert not torch.equal(first, second)
    assert first.dtype == dtype


def test_a_models_dropout_is_replaced_while_it_trains_and_only_then() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.AlphaDropout(0.5))
    quicken(model)
    twin = copy.deepcopy(model)
    x = torch.ones(6, 4)
    torch.manual_seed(2)
    found = model[1](x)
    torch.manual_seed(2)
    assert torch.equal(found, dropout(x, 0.5))
    assert torch.equal(twin.eval()[1](x), x)
    assert model[1].training, "a copy is a module of its own"


def alone(seed: int, *parts: torch.Tensor) -> list[torch.Tensor]:
    """These tensors, dropped one after the other by one who has the generator for himself."""
    torch.manual_seed(seed)
    return [dropout(part, 0.4) if number % 2 else nn.functional.dropout(part, 0.4) for number, part in enumerate(parts)]


@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4), width=st.integers(1, 9))
@settings(deadline=None)
def test_in_a_shared_batch_each_block_is_dropped_as_it_would_be_alone(sizes: list[int], width: int) -> None:
    rows = [torch.randn(size, width) for size in sizes]
    tokens = [torch.randn(1, 3 * size + 7, width) for size in sizes]
    wanted = [alone(seed, *parts) for seed, parts in enumerate(zip(rows, tokens, rows, strict=True))]
    states = []
    for seed in range(len(sizes)):
        torch.manual_seed(seed)
        states.append(torch.default_generator.get_state())
    streams = Streams(torch.default_generator, states, (sizes, [part.shape[1] for part in tokens]))
    usual = nn.functional.dropout
    with streams.shared():
        found = [nn.functional.dropout(torch.cat(rows), 0.4), dropout(torch.cat(tokens, 1), 0.4)]
        unseen(True)
        assert torch.equal(dropout(rows[0], 0.4), rows[0]), "nothing is drawn for what nobody sees"
        unseen(False)
        last = []
        for number, part in enumerate(rows):
            with of_block(number):
                last.append(nn.functional.dropout(part, 0.4))
    assert nn.functional.dropout is usual
    assert torch.equal(found[0], torch.cat([each[0] for each in wanted]))
    assert torch.equal(found[1], torch.cat([each[1] for each in wanted], 1))
    assert all(torch.equal(part, each[2]) for part, each in zip(last, wanted, strict=True))
