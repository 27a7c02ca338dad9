from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lora_cli.dropout import dropout
from lora_cli.errors import AdapterError
from lora_cli.nn.convolutions import LoraConvolution
from lora_cli.nn.embeddings import LoraEmbedding
from lora_cli.nn.fused import Placement
from lora_cli.nn.kinds import KINDS, kind_of
from lora_cli.nn.layers import LoraLayer, LoraLinear, generator_for
from lora_cli.nn.targets import FULL
from lora_cli.nn.variants import SCALINGS, VARIANTS
from lora_cli.nn.vera import draw_pair
from lora_cli.spec import SCALINGS as SCALING_NAMES
from lora_cli.spec import VARIANTS as VARIANT_NAMES

from .models import trained

NUM_IN, NUM_OUT = 12, 9
ANY_LAYER = tuple(name for name, variant in VARIANTS.items() if variant.scope != "linear" and variant.frozen != ("A",))
"""Variants for embeddings too."""


class Scaled(nn.Embedding):
    """As Gemma's: the output is multiplied."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.embed_scale = nn.Buffer(torch.tensor(3.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


def conv1d(bias: bool) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(NUM_OUT, NUM_IN)
    nn.init.normal_(layer.bias)
    return layer


def blocks(*parts: int) -> Placement:
    """Of three parts of three outputs each, the given ones."""
    return Placement({str(part): torch.arange(3) * 3 + part for part in parts}, NUM_OUT)


@dataclass(frozen=True)
class Case:
    """A kind of base layer, perhaps adapted in part. `bias` False: also tried without."""

    base: Callable[[bool], nn.Module]
    placement: Callable[[], Placement | None] = lambda: None
    biases: tuple[bool, ...] = (True,)
    # The others are in test_product.
    variants: tuple[str, ...] = ("lora", "dora")


CASES = {
    "Linear": Case(lambda bias: nn.Linear(NUM_IN, NUM_OUT, bias=bias), biases=(True, False)),
    "Conv1D": Case(conv1d),
    "Embedding": Case(lambda bias: nn.Embedding(NUM_IN, NUM_OUT, padding_idx=1), biases=(False,), variants=ANY_LAYER),
    "scaled Embedding": Case(lambda bias: Scaled(NUM_IN, NUM_OUT), biases=(False,), variants=ANY_LAYER),
    "parts of a Linear": Case(
        lambda bias: nn.Linear(NUM_IN, NUM_OUT, bias=bias), lambda: blocks(0, 2), (True, False), ("lora",)
    ),
    "parts of a Conv1D": Case(conv1d, lambda: blocks(1), variants=("lora",)),
}
PRODUCT = [
    pytest.param(case, bias, variant, id=f"{name}-{variant}" + "-no bias" * (not bias))
    for name, case in CASES.items()
    for bias in case.biases
    for variant in case.variants
]
LINEAR = CASES["Linear"]


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 3, NUM_IN, generator=torch.Generator().manual_seed(0))


def build(
    bias: bool = True, dtype: torch.dtype = torch.float32, case: Case = LINEAR, move: bool = True, **options: Any
) -> LoraLayer:
    torch.manual_seed(3)
    base = case.base(bias).to(dtype)
    kind = kind_of(base)
    assert kind is not None
    settings = {"r": 4, "alpha": 6.0, "generator": generator_for(0, "layer"), "placement": case.placement()} | options
    if options.get("variant") == "vera":
        settings["shared"] = draw_pair(4, NUM_OUT + 2, NUM_IN + 1, seed=0)
    layer = kind(base, **settings)
    return trained(layer) if move else layer  # type: ignore[return-value]


def inputs_of(layer: LoraLayer, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, LoraEmbedding):
        return torch.randint(NUM_IN, (5, 3), generator=generator)
    return torch.randn(5, 3, NUM_IN, generator=generator).to(dtype)


def effective(layer: LoraLayer) -> torch.Tensor:
    """The papers' formulas on plain matrices (out, in); with parts, row by row."""
    weight = layer.base_layer.weight if isinstance(layer, LoraLinear) else layer.base_layer.weight.T
    if layer.variant == "vera":
        return weight + layer.lambda_b.diag() @ layer.B[:NUM_OUT] @ layer.lambda_d.diag() @ layer.A[:, :NUM_IN]
    if layer.variant == "adalora":
        return weight + layer.scaling * layer.B @ layer.E.diag() @ layer.A
    if layer.placement is None:
        update = weight + layer.scaling * torch.einsum("or,ri->oi", layer.B, layer.A)
    else:
        rows = list(weight)
        for number, row in enumerate(layer.placement.rows.tolist()):
            first = layer.r * int(layer.placement.part[number])
            rows[row] = rows[row] + layer.scaling * layer.B[number] @ layer.A[first : first + layer.r]
        update = torch.stack(rows)
    if layer.variant in ("lora", "dylora"):
        return update
    lengths = torch.stack([row.norm() for row in update.detach()])
    return torch.diag(layer.magnitude / lengths) @ update


def dense(layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, LoraEmbedding):
        return effective(layer).T[x] * getattr(layer.base_layer, "embed_scale", 1.0)
    return functional.linear(x, effective(layer), layer.bias)


def test_tables_hold_the_names_of_the_spec() -> None:
    assert (*VARIANTS, FULL) == VARIANT_NAMES
    assert tuple(SCALINGS) == SCALING_NAMES


@pytest.mark.parametrize(("scaling", "expected"), [("alpha/r", 1.5), ("alpha/sqrt(r)", 3.0)])
def test_scaling_follows_its_name(scaling: str, expected: float) -> None:
    assert build(scaling=scaling).scaling == expected


@pytest.mark.parametrize(("case", "bias", "variant"), PRODUCT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_layer_computes_what_its_base_does(case: Case, bias: bool, variant: str, dtype: torch.dtype) -> None:
    layer = build(bias, dtype, case, move=False, variant=variant)
    x = inputs_of(layer, dtype)
    # DoRA divides by a length and multiplies by it again, which is the identity only up to rounding.
    rounding = 4 * torch.finfo(dtype).eps if variant == "dora" else 0
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=rounding, atol=rounding)


@pytest.mark.parametrize(("case", "bias", "variant"), PRODUCT)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_layer_computes_what_the_adapted_one_did(
    case: Case, bias: bool, variant: str, scaling: str, dropout: float, dtype: torch.dtype
) -> None:
    layer = build(bias, dtype, case, variant=variant, scaling=scaling, dropout=dropout).eval()
    x = inputs_of(layer, dtype)
    expected = layer(x)
    base_weight = layer.base_layer.weight.detach().clone()
    assert not torch.allclose(expected, layer.base_layer(x))
    layer.merge()
    assert layer(x).dtype == dtype
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.1}
    torch.testing.assert_close(layer(x), expected, **tolerance)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, base_weight)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_merged_weight_is_the_fp32_result_rounded_once(variant: str) -> None:
    layer = build(dtype=torch.bfloat16, variant=variant)
    wide = copy.deepcopy(layer)
    wide.base_layer.float()
    layer.merge()
    torch.testing.assert_close(layer.base_layer.weight, effective(wide).bfloat16(), rtol=0.008, atol=0)


@pytest.mark.parametrize(("case", "bias", "variant"), PRODUCT)
def test_output_and_gradients_equal_the_dense_formulation(case: Case, bias: bool, variant: str) -> None:
    layer = build(bias, case=case, variant=variant)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    x = inputs_of(layer)
    parameters = [layer.get_parameter(name) for name in names]
    inputs = [x.requires_grad_(), *parameters] if x.is_floating_point() else parameters
    target = torch.linspace(-1, 1, NUM_OUT)
    ours, expected = layer(x), dense(layer, x)
    torch.testing.assert_close(ours, expected)
    if isinstance(layer, LoraEmbedding):
        # The padding entry gets no gradient in either, once it is masked out of the dense one.
        keep = (x != (layer.base_layer.padding_idx or -1))[..., None]
        ours, expected = ours * keep, expected * keep
    gradients = torch.autograd.grad(functional.mse_loss(ours, target.expand_as(ours)), inputs)
    references = torch.autograd.grad(functional.mse_loss(expected, target.expand_as(expected)), inputs)
    for mine, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(mine, reference)
    assert {"A", "B"} - {*VARIANTS[variant].frozen} <= set(names)


@pytest.mark.parametrize(("case", "bias", "variant"), PRODUCT)
def test_weight_is_the_effective_one_with_gradients(case: Case, bias: bool, variant: str) -> None:
    layer = build(bias, case=case, variant=variant)
    matrix = layer.weight if isinstance(layer, LoraLinear) else layer.weight.T
    torch.testing.assert_close(matrix, effective(layer))
    assert layer.weight.shape == layer.base_layer.weight.shape == layer.delta_weight().shape
    assert layer.weight.requires_grad


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_base_has_one_kind_of_layer(case: Case) -> None:
    base = case.base(True)
    assert [kind for kind in KINDS if kind.fits(base)] == [kind_of(base)]


def test_convolution_is_not_taken_for_gpt2s() -> None:
    assert kind_of(nn.Conv1d(4, 4, 1)) is LoraConvolution
    assert kind_of(nn.Embedding(4, 4, max_norm=1.0)) is None


def test_padding_entry_is_never_changed() -> None:
    layer = build(case=CASES["Embedding"], move=False)
    optimizer = torch.optim.AdamW([layer.A, layer.B], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(torch.tensor([1, 2, 3, 1])) - 1).square().sum().backward()
        optimizer.step()
    changed = layer.delta_weight().abs().sum(1) > 0
    assert changed.tolist() == [number in (2, 3) for number in range(NUM_IN)]


def test_outputs_of_other_parts_stay_the_bases() -> None:
    layer = build(case=CASES["parts of a Linear"])
    x = inputs_of(layer)
    difference = (layer(x) - layer.base_layer(x)).abs().amax((0, 1)) > 0
    assert difference.tolist() == [True, False, True] * 3


def test_each_part_has_a_pair_of_its_own_and_spreads_back() -> None:
    layer = build(case=CASES["parts of a Linear"])
    assert (tuple(layer.A.shape), tuple(layer.B.shape)) == ((8, NUM_IN), (6, 4))
    spread = layer.placement.spread(layer.B)
    assert spread.shape == (NUM_OUT, 8)
    assert not spread[1::3].any()
    assert not spread[0::3, 4:].any()
    assert not spread[2::3, :4].any()
    assert torch.equal(layer.placement.gather(spread), layer.B)
    torch.testing.assert_close(layer.scaling * spread @ layer.A, layer.delta_weight())


def test_embedding_starts_as_loralibs_and_pefts_does() -> None:
    layer = build(case=CASES["Embedding"], move=False)
    assert not layer.A.any()
    assert layer.B.std().item() == pytest.approx(1, rel=0.3)
    assert torch.equal(layer.B, build(case=CASES["Embedding"], move=False).B)


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
    dropped = dropout(x, 0.5)
    expected = layer.base_layer(x) + 1.5 * dropped @ layer.A.T @ layer.B.T
    torch.testing.assert_close(ours, expected)


def test_dora_measures_its_rows_once_for_each_state_of_a_and_b(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_cli.nn import variants

    layer, measured, measure = build(variant="dora"), [], variants._row_lengths
    monkeypatch.setattr(variants, "_row_lengths", lambda layer: measured.append(1) or measure(layer))
    monkeypatch.setattr(variants, "_BLOCK", 2)
    x = torch.randn(3, layer.in_features)
    with torch.inference_mode():
        layer(x)
    before = len(measured)
    layer(x).sum().backward()
    layer(x)
    assert len(measured) == before <= 1
    with torch.no_grad():
        layer.B += 1
    found = layer(x)
    assert len(measured) == before + 1
    monkeypatch.setattr(variants, "_BLOCK", 1024)
    layer.measured = None
    torch.testing.assert_close(layer(x), found)
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), found)


def test_dora_leaves_a_row_of_zeros_zero() -> None:
    base = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        base.weight[1] = 0
    layer = LoraLinear(base, r=2, alpha=2.0, variant="dora")
    assert torch.equal(layer(torch.ones(4))[1], torch.zeros(()))


@pytest.mark.parametrize(("case", "bias", "variant"), PRODUCT)
def test_trained_tensors_are_fp32_over_a_bf16_base(case: Case, bias: bool, variant: str) -> None:
    layer = build(bias, torch.bfloat16, case, variant=variant)
    trained_ones = [p for p in layer.parameters() if p.requires_grad]
    layer(inputs_of(layer, torch.bfloat16)).float().square().sum().backward()
    assert {p.dtype for p in trained_ones} == {p.grad.dtype for p in trained_ones} == {torch.float32}


@pytest.mark.parametrize(("case", "bias", "variant"), PRODUCT)
def test_layer_works_under_autocast(case: Case, bias: bool, variant: str) -> None:
    layer = build(bias, case=case, variant=variant)
    x = inputs_of(layer)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, delta = layer(x), layer.delta_weight()
        # Autocast leaves a look-up as wide as its table.
        assert narrow.dtype == layer.base_layer(x).dtype
    assert delta.dtype == torch.float32
    torch.testing.assert_close(narrow.float(), layer(x), rtol=0.05, atol=0.2)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_layer_can_be_copied_and_moved(case: Case) -> None:
    layer = build(case=case)
    twin = copy.deepcopy(layer).double()
    torch.testing.assert_close(twin(inputs_of(layer, torch.float64)).float(), layer(inputs_of(layer)))
    assert {name.split(".")[0] for name in layer.state_dict()} == {"A", "B", "base_layer"}


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
