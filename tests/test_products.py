"""Products by oneDNN are those of torch, and only numbers of tokens that come again are compiled for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lora_cli import products
from lora_cli.products import filled, is_available, is_whole, quick_linear

needs_kernels = pytest.mark.skipif(not is_available(), reason="torch has no oneDNN for this processor")


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "is_available", lambda: True)


@pytest.mark.usefixtures("available")
def test_a_number_is_filled_up_by_a_sixteenth_at_most() -> None:
    for number in range(1, 5000):
        whole = filled(number)
        assert number <= whole <= number * 17 / 16
        assert filled(whole) == whole
        assert is_whole(whole) == (number >= 64)
        assert is_whole(number) == (number == whole and number >= 64)


@pytest.mark.usefixtures("available")
def test_numbers_are_few_and_grow_like_a_logarithm() -> None:
    assert {filled(number) for number in range(257, 513)} == set(range(272, 513, 16))
    assert len({filled(number) for number in range(2049, 4097)}) == 16


@needs_kernels
def test_they_are_found_whatever_is_computed_in() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert is_available.__wrapped__()


def test_without_kernels_nothing_is_filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "is_available", lambda: False)
    assert [filled(number) for number in (1, 100, 1001)] == [1, 100, 1001]


@needs_kernels
@settings(deadline=None, max_examples=50)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    has_bias=st.booleans(),
    is_transposed=st.booleans(),
    trains=st.sets(st.sampled_from(["x", "matrix", "bias"]), min_size=1),
)
def test_it_is_linear_with_its_gradients(
    shape: list[int], inputs: int, outputs: int, has_bias: bool, is_transposed: bool, trains: set[str]
) -> None:
    torch.manual_seed(0)
    tensors = {
        "x": torch.randn(*shape, inputs),
        "matrix": torch.randn(inputs, outputs).T if is_transposed else torch.randn(outputs, inputs),
        **({"bias": torch.randn(outputs)} if has_bias else {}),
    }
    wanted = [tensor.requires_grad_() for name, tensor in tensors.items() if name in trains]
    arguments = tensors["x"], tensors["matrix"], tensors.get("bias")
    made = [functional.linear(*arguments), quick_linear(*arguments)]
    torch.testing.assert_close(made[1], made[0], rtol=1e-5, atol=1e-5)
    if wanted:
        weights = torch.randn(*shape, outputs)
        # As by an adapter's update, the output is written into.
        gradients = [torch.autograd.grad(each.mul_(weights).sum(), wanted) for each in made]
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-4)


@needs_kernels
def test_without_a_gradient_wanted_none_is_kept() -> None:
    matrix = torch.randn(4, 3)
    assert quick_linear(torch.randn(5, 3), matrix, None).grad_fn is None
    with torch.no_grad():
        assert quick_linear(torch.randn(5, 3, requires_grad=True), matrix, None).grad_fn is None


@needs_kernels
def test_what_a_frozen_weight_is_multiplied_by_is_not_kept() -> None:
    x = torch.randn(5, 3, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        quick_linear(x, torch.randn(4, 3), None)
    assert [tuple(tensor.shape) for tensor in kept] == [(4, 3)]
