"""Layers whose weights are laid out beforehand compute what they did, whatever happens to the weights."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_cli import prepacked
from lora_cli.nn.layers import LoraLinear
from lora_cli.prepacked import prepack
from lora_cli.products import is_available
from nn.models import tiny_lm


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


pytestmark = pytest.mark.skipif(not is_available(), reason="torch has no oneDNN for this processor")


def linear(inputs: int = 12, outputs: int = 20, *, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs, bias=bias)).requires_grad_(False)


@given(
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    rows=st.integers(0, 70),
    bias=st.booleans(),
    is_conv1d=st.booleans(),
)
@settings(deadline=None)
def test_the_same_comes_out_up_to_rounding(inputs: int, outputs: int, rows: int, bias: bool, is_conv1d: bool) -> None:
    torch.manual_seed(0)
    layer = Conv1D(outputs, inputs) if is_conv1d else nn.Linear(inputs, outputs, bias=bias)
    plain = nn.Sequential(layer).requires_grad_(False)
    packed = copy.deepcopy(plain)
    assert prepack(packed, limit_mib=1) == 1
    for x in (torch.randn(rows, inputs), torch.randn(rows, 1, inputs), torch.randn(inputs, rows, 1).transpose(0, 2)):
        with torch.inference_mode():
            torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-5)


def test_few_tokens_meet_the_copy_and_many_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    product = prepacked.product
    monkeypatch.setattr(prepacked, "product", lambda x, *rest: seen.append(len(x)) or product(x, *rest))
    model = linear()
    prepack(model, limit_mib=1)
    seen.clear()
    with torch.inference_mode():
        for rows in (1, 7, 8, 9, 32, 33, 64, 65, 500):
            assert model(torch.randn(rows, 12)).shape == (rows, 20)
    assert seen == [1, 7, 8, 16, 32, 40, 64]


def test_many_tokens_take_the_weight_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    quick = prepacked.quick_linear
    monkeypatch.setattr(prepacked, "quick_linear", lambda x, *rest: seen.append(len(x)) or quick(x, *rest))
    monkeypatch.setattr(prepacked, "as_kernels_read", lambda matrix: pytest.fail("no copy is wanted"))
    model = linear()
    prepack(model, limit_mib=1)
    for rows in (65, 72, 96, 97, 512):
        x = torch.randn(rows, 12, requires_grad=True)
        torch.testing.assert_close(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))
        with torch.enable_grad():
            found, wanted = model(x), nn.functional.linear(x, model[0].weight, model[0].bias)
            gradients = [torch.autograd.grad(each.square().sum(), x)[0] for each in (found, wanted)]
        torch.testing.assert_close(*gradients)
    assert seen == [72, 72, 96, 96, 512, 512]


@pytest.mark.parametrize("trains", ["weight", "bias"])
def test_what_trains_gets_its_gradient(trains: str) -> None:
    model, x = linear(), torch.randn(96, 12)
    plain = copy.deepcopy(model)
    prepack(model, limit_mib=1)
    found = []
    for each in (model, plain):
        parameter = each[0].get_parameter(trains).requires_grad_(True)
        with torch.enable_grad():
            each(x).square().sum().backward()
        found.append(parameter.grad)
    torch.testing.assert_close(*found)


def test_where_gradients_are_wanted_few_tokens_meet_no_copy() -> None:
    model, x = linear(), torch.randn(3, 12, requires_grad=True)
    with torch.enable_grad():
        wanted = model(x)
        prepack(model, limit_mib=1)
        found = model(x)
    assert torch.equal(found, wanted)
    assert type(found.grad_fn) is type(wanted.grad_fn)


def test_a_weight_that_was_written_to_or_replaced_is_laid_out_anew() -> None:
    model, x = linear(), torch.randn(3, 12)
    prepack(model, limit_mib=1)
    layer = model[0]
    model(x)
    layer.weight.mul_(2)
    torch.testing.assert_close(model(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer.weight.data = torch.randn(20, 12)
    torch.testing.assert_close(model(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer.weight = nn.Parameter(torch.randn(20, 12), requires_grad=False)
    torch.testing.assert_close(model(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_an_adapter_goes_into_the_base_and_out_again() -> None:
    model, x = linear(), torch.randn(3, 12)
    prepack(model, limit_mib=1)
    adapted = LoraLinear(model[0], r=4, alpha=8)
    torch.nn.init.normal_(adapted.B)
    before, unmerged = model(x), adapted(x)
    adapted.merge()
    torch.testing.assert_close(adapted(x), unmerged, rtol=1e-5, atol=1e-5)
    adapted.unmerge()
    assert torch.equal(model(x), before)


def test_a_weight_that_trains_has_no_copy() -> None:
    model, x = linear(), torch.randn(3, 12)
    prepack(model, limit_mib=1)
    layer = model[0]
    layer.weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([layer.weight], lr=1.0, fused=True)
    model(x)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    assert torch.equal(model(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_a_copy_of_the_model_shares_what_its_weight_does_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = linear(), torch.randn(3, 12)
    prepack(model, limit_mib=1)
    before = model(x)
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    monkeypatch.setattr(prepacked, "as_kernels_read", lambda matrix: pytest.fail("it is laid out already"))
    assert torch.equal(twin(x), before)
    monkeypatch.undo()
    twin[0].weight = nn.Parameter(torch.randn(20, 12), requires_grad=False)
    torch.testing.assert_close(twin(x), nn.functional.linear(x, twin[0].weight, twin[0].bias))
    assert torch.equal(model(x), before)


def test_first_layers_come_first_as_far_as_the_limit_goes() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4))).requires_grad_(False)
    # A weight is a quarter of a MiB.
    assert prepack(model, limit_mib=1) == 4
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 512), nn.Linear(512, 4))
    assert prepack(model, limit_mib=1) == 1
    model.requires_grad_(False)(torch.randn(3, 256))
    assert [layer.weight in prepacked._copies for layer in model] == [True, False, False]


def test_copies_can_be_had_for_a_while_and_are_let_go_of() -> None:
    gc.collect()
    model, x, before = nn.Sequential(linear(), linear(20, 4)), torch.randn(3, 12), len(prepacked._copies)
    prepack(model, limit_mib=1, copies=False)
    plain = model(x)
    assert len(prepacked._copies) == before
    forwards = [layer[0].forward for layer in model]
    with prepacked.laid_out(model, limit_mib=1):
        torch.testing.assert_close(model(x), plain, rtol=1e-5, atol=1e-5)
        assert len(prepacked._copies) == before + 2
    assert len(prepacked._copies) == before
    assert [layer[0].forward for layer in model] == forwards
    assert torch.equal(model(x), plain)


def test_copies_that_a_model_has_for_good_stay_and_count() -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 512)).requires_grad_(False)
    assert prepack(model, limit_mib=1) == 1
    model(torch.randn(3, 256))
    with prepacked.laid_out(model, limit_mib=1):
        model(torch.randn(3, 256))
        assert [layer.weight in prepacked._copies for layer in model] == [True, False]
    assert model[0].weight in prepacked._copies


def test_a_model_can_be_pickled_and_leaves_no_copy_behind() -> None:
    gc.collect()
    model, x, before = linear(), torch.randn(3, 12), len(prepacked._copies)
    prepack(model, limit_mib=1)
    wanted = model(x)
    assert len(prepacked._copies) == before + 1
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), wanted)
    del model, again
    gc.collect()
    assert len(prepacked._copies) == before


@pytest.mark.parametrize(
    ("model", "skip"),
    [(linear(), ["0"]), (linear().double(), []), (linear().to("meta"), []), (nn.Sequential(nn.Embedding(5, 4)), [])],
)
def test_nothing_else_is_touched(model: nn.Sequential, skip: list[str]) -> None:
    assert prepack(model, limit_mib=1024, skip=skip) == 0


def test_zero_turns_it_off() -> None:
    assert prepack(linear(), limit_mib=0) == 0


def test_another_dtype_of_the_input_goes_the_usual_way() -> None:
    model = linear()
    prepack(model, limit_mib=1)
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.randn(3, 12, dtype=torch.float64))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoder_writes_the_same(family: str) -> None:
    model = tiny_lm(family).requires_grad_(False)
    packed = copy.deepcopy(model)
    assert prepack(packed, limit_mib=64)
    ids = torch.randint(5, 40, (3, 6), generator=torch.Generator().manual_seed(0))
    decode = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
    torch.testing.assert_close(packed(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(packed.generate(ids, **decode), model.generate(ids, **decode))
