"""Attention over rows as batches of matrices is torch's own, row by row, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from lora_cli import row_attention
from lora_cli.dropout import dropout
from lora_cli.row_attention import attend, lay

CPU = torch.device("cpu")
HEADS, SIZE = 4, 8
lengths_of_rows = st.lists(st.integers(1, 12), min_size=1, max_size=9)


def drawn(lengths: list[int], heads: int = HEADS, seed: int = 0) -> Tensor:
    """(1, T, heads, d)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, sum(lengths), heads, SIZE, generator=generator, dtype=torch.float64)


def row_by_row(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], order: Tensor, **how: object) -> Tensor:
    """torch's attention of each row alone, whatever lies before and behind it."""
    parts = [x.transpose(1, 2).split([lengths[number] for number in order], 2) for x in (q, k, v)]
    outs = [functional.scaled_dot_product_attention(*each, enable_gqa=True, **how) for each in zip(*parts, strict=True)]  # type: ignore[arg-type]
    return torch.cat(outs, 2).transpose(1, 2)


@pytest.mark.parametrize("short", [256, 0], ids=["plain", "fused"])
@pytest.mark.parametrize("causal", [False, True])
@given(lengths=lengths_of_rows, key_heads=st.sampled_from([1, 2, 4]), owned=st.booleans())
@settings(deadline=None, max_examples=30)
def test_it_is_torchs_attention_of_each_row_with_its_gradients(
    short: int, causal: bool, lengths: list[int], key_heads: int, owned: bool
) -> None:
    owners = torch.arange(len(lengths)) % 2 if owned else None
    inputs = [drawn(lengths, heads, seed).requires_grad_() for seed, heads in enumerate((HEADS, key_heads, key_heads))]
    rows, order = lay(torch.tensor(lengths), CPU, owners=owners)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_attention, "_SHORT", short)
        found, _ = attend(torch.nn.Module(), *(x.transpose(1, 2) for x in inputs), None, causal=causal, rows=rows)
    wanted = row_by_row(*inputs, lengths, order, is_causal=causal)
    torch.testing.assert_close(found, wanted)
    weights = drawn(lengths, seed=9)
    for gradient, right in zip(
        *(torch.autograd.grad((x * weights).sum(), inputs) for x in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(gradient, right)


def test_the_gradients_are_those_of_differences_with_dropout_too() -> None:
    lengths = [3, 1, 4]
    rows, _ = lay(torch.tensor(lengths), CPU)

    def dropping(*inputs: Tensor) -> Tensor:
        torch.manual_seed(5)
        heads = (x.transpose(1, 2) for x in inputs)
        return attend(torch.nn.Module(), *heads, None, causal=False, dropout=0.4, rows=rows)[0]

    assert torch.autograd.gradcheck(dropping, [drawn(lengths, seed=seed).requires_grad_() for seed in range(3)])


def test_weights_are_dropped_as_dropout_drops_them() -> None:
    lengths = [5, 5]
    rows, _ = lay(torch.tensor(lengths), CPU)
    assert len(rows.groups) == 1
    q, k, v = (drawn(lengths, seed=seed).transpose(1, 2) for seed in range(3))
    torch.manual_seed(1)
    found, _ = attend(torch.nn.Module(), q, k, v, None, causal=False, dropout=0.5, rows=rows)
    weights = torch.stack(
        [(a @ b.mT * SIZE**-0.5).softmax(-1) for a, b in zip(q.split(5, 2), k.split(5, 2), strict=True)]
    )
    torch.manual_seed(1)
    dropped = dropout(weights.view(-1, 5, 5), 0.5).view_as(weights)
    wanted = torch.cat([a @ b for a, b in zip(dropped, v.split(5, 2), strict=True)], 2)
    torch.testing.assert_close(found, wanted.transpose(1, 2))


def test_layers_that_are_alike_share_one_layout() -> None:
    rows, _ = lay(torch.tensor([2, 3]), CPU)
    assert rows.layout(4, 1, None, causal=True) is rows.layout(4, 1, None, causal=True)
    assert rows.layout(4, 1, None, causal=True) is not rows.layout(4, 2, None, causal=True)


@given(lengths=lengths_of_rows, cost=st.sampled_from([0, 1, 30, 10**6]))
def test_no_other_groups_of_neighbours_cost_less(lengths: list[int], cost: int) -> None:
    def price(sizes: list[int]) -> int:
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return sum(size * lengths[end - 1] ** 2 + cost for size, end in zip(sizes, ends, strict=True))

    lengths = sorted(lengths)
    cuts = [[int(bit) for bit in f"{number:0{len(lengths) - 1}b}"] for number in range(2 ** (len(lengths) - 1))]
    every = [[len(part) for part in _parted(len(lengths), each if len(lengths) > 1 else [])] for each in cuts]
    found = row_attention._group_sizes(lengths, cost)
    assert sum(found) == len(lengths)
    assert price(found) == min(map(price, every))


def _parted(count: int, cuts: list[int]) -> list[list[int]]:
    """0..count-1 in a row, with a cut behind number i where cuts[i] is 1."""
    parts: list[list[int]] = [[]]
    for number in range(count):
        parts[-1].append(number)
        if number < count - 1 and cuts[number]:
            parts.append([])
    return parts
