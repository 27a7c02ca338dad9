"""Every layer × variant × init × scaling × bias × dtype: what the library promises, held against formulas of its own.

A variant or an init that is added to its table is tried here at once. A variant needs its formula in DENSE, or a reason
in EXCLUDED; a combination that is refused needs a line in ILLEGAL, and is then checked to be refused by that name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_cli.errors import ConfigError
from lora_cli.nn.adapter import load_adapter, save_adapter
from lora_cli.nn.eva import start_from_inputs
from lora_cli.nn.inits import INITS
from lora_cli.nn.inject import Injection, inject, merge, unmerge
from lora_cli.nn.layers import LoraLayer
from lora_cli.nn.variants import VARIANTS
from lora_cli.spec import LoraSpec

from .models import trained

# PEFT asks the hub for the base's config when it saves; there is no hub in a test.
os.environ["HF_HUB_OFFLINE"] = "1"

R, ALPHA, NUM_IN, NUM_OUT = 4, 6.0, 12, 24
NAME = "attn.c_attn"


class FusedConfig:
    """Tells that the layer is GPT-2's query, key and value."""

    model_type = "gpt2"


class OneLayer(nn.Module):
    """A model of one layer, by the name that GPT-2 gives its fused projection."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.c_attn = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attn.c_attn(x)
        return result


def conv1d(bias: bool) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(NUM_OUT, NUM_IN)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def words() -> Tensor:
    return torch.randint(NUM_IN, (5, 3), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Layer:
    """A kind of base layer and what goes in."""

    make: Callable[[bool], nn.Module]
    inputs: Callable[[], Tensor] = lambda: draw(5, 3, NUM_IN)
    biases: tuple[bool, ...] = (True, False)
    target: str = "c_attn"
    groups: int = 1


LAYERS = {
    "Linear": Layer(lambda bias: nn.Linear(NUM_IN, NUM_OUT, bias=bias)),
    "transformers' Conv1D": Layer(conv1d, biases=(True,)),
    "Embedding": Layer(lambda bias: nn.Embedding(NUM_IN, NUM_OUT), words, (False,)),
    "Conv1d": Layer(lambda bias: nn.Conv1d(6, 10, 3, bias=bias, stride=2), lambda: draw(2, 6, 9)),
    "Conv2d": Layer(lambda bias: nn.Conv2d(4, 10, 3, bias=bias, padding=1), lambda: draw(2, 4, 5, 4)),
    "Conv3d": Layer(lambda bias: nn.Conv3d(3, 10, 2, bias=bias), lambda: draw(2, 3, 3, 4, 3)),
    "Conv2d in groups": Layer(
        lambda bias: nn.Conv2d(4, 10, 3, bias=bias, groups=2), lambda: draw(2, 4, 5, 4), groups=2
    ),
    "part of a Linear": Layer(lambda bias: nn.Linear(NUM_IN, NUM_OUT, bias=bias), target="c_attn:q+v"),
    "part of a Conv1D": Layer(conv1d, biases=(True,), target="c_attn:q+v"),
}
CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d", "Conv2d in groups")
PARTS = ("part of a Linear", "part of a Conv1D")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

EXCLUDED: dict[str, str] = {}
"""Variant → why it is not tried here, and where it is."""

ALL_LAYERS, ALL_VARIANTS, ALL_INITS = tuple(LAYERS), tuple(VARIANTS), tuple(INITS)
ILLEGAL: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], str], ...] = (
    (("Embedding",), ("lora_fa",), ALL_INITS, r"lora.variant=lora_fa: not for an embedding"),
    (PARTS, ("dora",), ALL_INITS, r"lora.variant=dora: not for parts of a fused projection"),
    (("Conv2d in groups",), ("dora",), ALL_INITS, r"lora.variant=dora: not for a convolution in 2 groups"),
    (("Embedding",), ALL_VARIANTS, ("orthogonal", "pissa", "olora", "eva"), r"lora.init=\w+: not for an embedding"),
    (CONVOLUTIONS, ALL_VARIANTS, ("eva",), r"lora.init=eva: not for a convolution"),
)
"""Layers, variants, inits → what is said of each of them together."""


@dataclass(frozen=True)
class Case:
    """One cell of the product but for its dtype."""

    layer: str
    variant: str
    init: str
    scaling: str = "alpha/r"
    bias: bool = True

    @property
    def spec(self) -> LoraSpec:
        target = LAYERS[self.layer].target
        settings = {"variant": self.variant, "init": self.init, "scaling": self.scaling, "targets": [target]}
        return LoraSpec(r=R, alpha=ALPHA, **settings)

    @property
    def refusal(self) -> str | None:
        return next(
            (
                says
                for layers, variants, inits, says in ILLEGAL
                if self.layer in layers and self.variant in variants and self.init in inits
            ),
            None,
        )

    def __str__(self) -> str:
        name = f"{self.layer}-{self.variant}-{self.init}"
        return name + "-rslora" * (self.scaling != "alpha/r") + "-no bias" * (not self.bias)


METHODS = [(variant, init, "alpha/r") for variant in VARIANTS if variant not in EXCLUDED for init in INITS]
METHODS += [("lora", init, "alpha/sqrt(r)") for init in INITS]
CASES = [Case(layer, *method, bias) for layer, base in LAYERS.items() for method in METHODS for bias in base.biases]
LEGAL = [case for case in CASES if case.refusal is None]
REFUSED = [case for case in CASES if case.refusal is not None]
EXACT = [case for case in LEGAL if case.variant in ("lora", "lora_fa") and case.init != "orthogonal"]


def base_of(case: Case, dtype: torch.dtype = torch.float32) -> OneLayer:
    """The same weights at each call."""
    model, generator = OneLayer(LAYERS[case.layer].make(case.bias)), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5, generator=generator)
    if case.layer in PARTS:
        model.config = FusedConfig()
    return model.to(dtype)


def inputs_of(case: Case, dtype: torch.dtype = torch.float32) -> Tensor:
    x = LAYERS[case.layer].inputs()
    return x.to(dtype) if x.is_floating_point() else x


def adapted(case: Case, dtype: torch.dtype = torch.float32) -> tuple[OneLayer, Injection]:
    """At its start."""
    model = base_of(case, dtype)
    injection = inject(model, case.spec, groups={}, seed=1)
    start_from_inputs(model, [lambda: model(inputs_of(case, dtype))])
    return model, injection


def layer_of(model: OneLayer) -> LoraLayer:
    layer = model.attn.c_attn
    assert isinstance(layer, LoraLayer)
    return layer


def product(case: Case, A: Tensor, B: Tensor) -> Tensor:
    """B·A as (out, in), block by block."""
    groups = LAYERS[case.layer].groups
    if case.layer in PARTS:
        third = len(B) // 2
        return torch.cat([B[:third] @ A[:R], B.new_zeros(third, A.shape[1]), B[third:] @ A[R:]])
    return torch.cat([b @ a for a, b in zip(A.chunk(groups), B.chunk(groups), strict=True)])


def lora(layer: LoraLayer, matrix: Tensor, update: Tensor) -> Tensor:
    return matrix + update


def dora(layer: LoraLayer, matrix: Tensor, update: Tensor) -> Tensor:
    direction = matrix + update
    return torch.diag(layer.magnitude.to(matrix.dtype) / direction.detach().norm(dim=1)) @ direction


DENSE: dict[str, Callable[[LoraLayer, Tensor, Tensor], Tensor]] = {"lora": lora, "dora": dora, "lora_fa": lora}
"""Variant → the effective weight (out, in) from (layer, base weight, update), as its paper has it."""


def dense(case: Case, layer: LoraLayer, start: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """The base with the paper's weight in the weight's place; `start` is (A, B) as they were drawn."""
    weight = layer.base_layer.weight.detach()
    is_transposed = case.layer in ("Embedding", "transformers' Conv1D", "part of a Conv1D")
    matrix = weight.T if is_transposed else weight.flatten(1)
    s = ALPHA / R if case.scaling == "alpha/r" else ALPHA / R**0.5
    # PiSSA and OLoRA: what they start from is off the base weight.
    residual = matrix - s * product(case, *start).to(matrix.dtype) if case.init in ("pissa", "olora") else matrix
    update = s * product(case, layer.A, layer.B).to(matrix.dtype)
    if case.init in ("pissa", "olora") and case.variant == "dora":
        residual, update = matrix, update - s * product(case, *start).to(matrix.dtype)
    effective = DENSE[case.variant](layer, residual, update)
    effective = effective.T if is_transposed else effective.view(weight.shape)
    return torch.func.functional_call(layer.base_layer, {"weight": effective}, (x,))


def test_every_variant_has_a_formula_or_a_reason_to_have_none() -> None:
    assert DENSE.keys() | EXCLUDED.keys() == VARIANTS.keys()
    assert not DENSE.keys() & EXCLUDED.keys()


def test_the_product_has_this_many_cases() -> None:
    legal, refused = len(LEGAL) * len(DTYPES), len(REFUSED)
    print(f"{legal} cases of {len(LEGAL)} combinations in {len(DTYPES)} dtypes; {refused} combinations refused")
    assert (legal, refused) == (1128, 78)


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_an_illegal_combination_is_refused_by_name(case: Case) -> None:
    model = base_of(case)
    with pytest.raises(ConfigError, match=case.refusal):
        inject(model, case.spec, groups={})
    assert not isinstance(model.attn.c_attn, LoraLayer)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", LEGAL, ids=str)
def test_a_layer_starts_as_its_base_learns_as_its_paper_says_and_merges(case: Case, dtype: torch.dtype) -> None:
    model, x = adapted(case, dtype)[0], inputs_of(case, dtype)
    check_start(case, model, x)
    start = (layer_of(model).A.detach().clone(), layer_of(model).B.detach().clone())
    trained(model)
    check_what_trains(case, layer_of(model))
    if dtype in (torch.float32, torch.float64):
        # A narrow dtype would hide a wrong formula in its rounding.
        check_gradients(case, model, start, x)
    check_merge(model, x.detach())


def check_start(case: Case, model: OneLayer, x: Tensor) -> None:
    """Neutral: exactly, but for DoRA and the orthogonal init, which are so up to rounding."""
    dtype = layer_of(model).base_layer.weight.dtype
    rounding = 0.0 if case in EXACT else 8 * torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps
    with torch.no_grad():
        torch.testing.assert_close(model(x), layer_of(model).base_layer(x), rtol=rounding, atol=rounding)


def check_what_trains(case: Case, layer: LoraLayer) -> None:
    names = {name for name, p in layer.named_parameters() if p.requires_grad}
    variant = VARIANTS[case.variant]
    assert names == {"A", "B", *variant.parameters} - set(variant.frozen)


def check_gradients(case: Case, model: OneLayer, start: tuple[Tensor, Tensor], x: Tensor) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    inputs = [*parameters, *([x.requires_grad_()] if x.is_floating_point() else [])]
    ours, expected = model(x), dense(case, layer_of(model), start, x)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    target = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view_as(ours)
    gradients = torch.autograd.grad((ours - target).square().mean(), inputs)
    references = torch.autograd.grad((expected - target).square().mean(), inputs)
    for mine, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-5)


CLOSE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Largest difference relative to the largest output; a merge is computed in fp32, whatever the base."""


@torch.no_grad()
def check_merge(model: OneLayer, x: Tensor) -> None:
    layer = layer_of(model)
    before, expected, unadapted = layer.base_layer.weight.detach().clone(), model(x), layer.base_layer(x)
    assert not torch.allclose(expected, unadapted)
    merge(model)
    assert (model(x) - expected).abs().max() <= CLOSE[x.dtype if x.is_floating_point() else before.dtype] * (
        expected.abs().max()
    )
    unmerge(model)
    assert torch.equal(layer.base_layer.weight, before)
    assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")  # PEFT cannot merge it; we can.
@pytest.mark.parametrize("case", LEGAL, ids=str)
def test_what_is_saved_computes_the_same_here_and_in_peft(case: Case, tmp_path: Path) -> None:
    from peft import PeftModel

    (model, injection), again, base = adapted(case), base_of(case), base_of(case)
    options: dict[str, Any] = {"base_name": None, "revision": None, "task_type": None, "fingerprint": None}
    save_adapter(trained(model), injection, tmp_path / "adapter", extra={}, **options)
    load_adapter(again, tmp_path / "adapter", fresh=[], fingerprint=None)
    base.config = None
    peft = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    x, wide = inputs_of(case), inputs_of(case, torch.float64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        torch.testing.assert_close(peft.double()(wide), model.double()(wide), rtol=1e-6, atol=1e-6)
