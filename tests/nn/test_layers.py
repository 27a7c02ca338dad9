from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lora_cli.errors import AdapterError
from lora_cli.nn.layers import LoraLinear, generator_for
from lora_cli.nn.variants import SCALINGS, VARIANTS
from lora_cli.spec import SCALINGS as SCALING_NAMES
from lora_cli.spec import VARIANTS as VARIANT_NAMES

from .models import trained


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 3, 12, generator=torch.Generator().manual_seed(0))


def build(bias: bool = True, dtype: torch.dtype = torch.float32, **options: Any) -> LoraLinear:
    torch.manual_seed(3)
    base = nn.Linear(12, 8, bias=bias, dtype=dtype)
    layer = LoraLinear(base, generator=generator_for(0, "layer"), **({"r": 4, "alpha": 6.0} | options))
    return trained(layer)  # type: ignore[return-value]


def effective(layer: LoraLinear) -> torch.Tensor:
    """The papers' formulas on plain matrices."""
    update = layer.base_layer.weight + layer.scaling * torch.einsum("or,ri->oi", layer.B, layer.A)
    if layer.variant == "lora":
        return update
    lengths = torch.stack([row.norm() for row in update.detach()])
    return torch.diag(layer.magnitude / lengths) @ update


def test_tables_hold_the_names_of_the_spec() -> None:
    assert tuple(VARIANTS) == VARIANT_NAMES
    assert tuple(SCALINGS) == SCALING_NAMES


@pytest.mark.parametrize(("scaling", "expected"), [("alpha/r", 1.5), ("alpha/sqrt(r)", 3.0)])
def test_scaling_follows_its_name(scaling: str, expected: float) -> None:
    assert build(scaling=scaling).scaling == expected


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_new_layer_computes_what_its_base_does(variant: str, bias: bool, x: torch.Tensor) -> None:
    base = nn.Linear(12, 8, bias=bias)
    layer = LoraLinear(base, r=2, alpha=4.0, variant=variant)
    torch.testing.assert_close(layer(x), base(x), rtol=0, atol=0 if variant == "lora" else 1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_layer_computes_what_the_adapted_one_did(
    bias: bool, variant: str, scaling: str, dropout: float, dtype: torch.dtype, x: torch.Tensor
) -> None:
    layer = build(bias, dtype, variant=variant, scaling=scaling, dropout=dropout).eval()
    expected = layer(x.to(dtype))
    base_weight = layer.base_layer.weight.detach().clone()
    layer.merge()
    assert layer(x.to(dtype)).dtype == dtype
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.1}
    torch.testing.assert_close(layer(x.to(dtype)), expected, **tolerance)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, base_weight)
    assert torch.equal(layer(x.to(dtype)), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_weight_is_the_fp32_result_rounded_once(variant: str) -> None:
    layer = build(dtype=torch.bfloat16, variant=variant)
    wide = copy.deepcopy(layer)
    wide.base_layer.float()
    layer.merge()
    torch.testing.assert_close(layer.base_layer.weight, effective(wide).bfloat16(), rtol=0.008, atol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_gradients_equal_the_dense_formulation(variant: str, bias: bool, x: torch.Tensor) -> None:
    layer = build(bias, variant=variant)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    inputs = [x.requires_grad_(), *(layer.get_parameter(name) for name in names)]
    target = torch.linspace(-1, 1, 8)
    ours, dense = layer(x), functional.linear(x, effective(layer), layer.bias)
    torch.testing.assert_close(ours, dense)
    gradients = torch.autograd.grad(functional.mse_loss(ours, target.expand_as(ours)), inputs)
    expected = torch.autograd.grad(functional.mse_loss(dense, target.expand_as(dense)), inputs)
    for mine, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, reference)
    assert {"A", "B"} <= set(names)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weight_is_the_effective_one_with_gradients(variant: str, x: torch.Tensor) -> None:
    layer = build(variant=variant)
    torch.testing.assert_close(functional.linear(x, layer.weight, layer.bias), layer(x))
    assert layer.weight.requires_grad


def test_multihead_attention_that_bypasses_forward_uses_the_update(x: torch.Tensor) -> None:
    attention = nn.MultiheadAttention(12, 2).eval()
    before = attention(x, x, x)[0]
    attention.out_proj = trained(LoraLinear(attention.out_proj, r=2, alpha=4.0))
    after = attention(x, x, x)[0]
    attention.out_proj.merge()
    torch.testing.assert_close(attention(x, x, x)[0], after)
    assert not torch.allclose(after, before)


def test_dropout_acts_on_the_input_of_a_only(x: torch.Tensor) -> None:
    layer = build(dropout=0.5).train()
    torch.manual_seed(11)
    ours = layer(x)
    torch.manual_seed(11)
    dropped = functional.dropout(x, 0.5)
    expected = layer.base_layer(x) + 1.5 * dropped @ layer.A.T @ layer.B.T
    torch.testing.assert_close(ours, expected)


def test_dora_leaves_a_row_of_zeros_zero() -> None:
    base = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        base.weight[1] = 0
    layer = LoraLinear(base, r=2, alpha=2.0, variant="dora")
    assert torch.equal(layer(torch.ones(4))[1], torch.zeros(()))


def test_trained_tensors_are_fp32_over_a_bf16_base(x: torch.Tensor) -> None:
    layer = build(dtype=torch.bfloat16, variant="dora")
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}
    layer(x.bfloat16()).sum().backward()
    assert {p.grad.dtype for p in (layer.A, layer.B, layer.magnitude)} == {torch.float32}


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_works_under_autocast(variant: str, x: torch.Tensor) -> None:
    layer = build(variant=variant)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, delta = layer(x), layer.delta_weight()
    assert narrow.dtype == torch.bfloat16
    assert delta.dtype == torch.float32
    torch.testing.assert_close(narrow.float(), layer(x), rtol=0.05, atol=0.1)


def test_merging_twice_is_refused() -> None:
    layer = build()
    layer.merge()
    with pytest.raises(AdapterError, match="merged already"):
        layer.merge()


def test_unmerging_an_unmerged_layer_is_refused() -> None:
    with pytest.raises(AdapterError, match="not merged"):
        build().unmerge()


def test_merge_that_overflows_is_refused_and_leaves_the_base_alone() -> None:
    layer = build(dtype=torch.float16, alpha=9000.0)
    layer.A.data *= 1e4
    before = layer.base_layer.weight.clone()
    with pytest.raises(AdapterError, match="not finite"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.is_merged


def test_merge_reports_the_largest_change() -> None:
    layer = build()
    expected = layer.delta_weight().abs().max().item()
    assert layer.merge() == pytest.approx(expected, rel=1e-5)


def test_train_and_eval_never_merge(x: torch.Tensor) -> None:
    layer = build()
    before = layer.base_layer.weight.clone()
    layer.eval()(x)
    layer.train()(x)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.is_merged


def test_state_holds_only_parameters_also_while_merged() -> None:
    layer = build(variant="dora")
    layer.merge()
    assert set(layer.state_dict()) == {"A", "B", "magnitude", "base_layer.weight", "base_layer.bias"}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**63 - 1), st.text(max_size=20))
def test_generator_depends_on_seed_and_name_alone(seed: int, name: str) -> None:
    draw = torch.rand(3, generator=generator_for(seed, name))
    assert torch.equal(draw, torch.rand(3, generator=generator_for(seed, name)))
    assert not torch.equal(draw, torch.rand(3, generator=generator_for(seed, name + "x")))
    assert not torch.equal(draw, torch.rand(3, generator=generator_for(seed ^ 1, name)))


def test_init_is_kaiming_uniform_from_a_seed_that_no_release_changes() -> None:
    generator = generator_for(5, "encoder.0.query")
    assert generator.initial_seed() == 1461777335461124662
    layer = LoraLinear(nn.Linear(16, 4), r=4, alpha=1.0, generator=generator)
    assert layer.A.abs().max() <= 16**-0.5
    assert layer.A.std().item() == pytest.approx(16**-0.5 / 3**0.5, rel=0.2)
    assert not layer.B.any()
