"""Every layer × variant × init × scaling × bias × dtype: what the library promises, held against formulas of its own.

A variant or an init that is added to its table is tried here at once. A variant needs its formula in DENSE; a
combination that is refused needs a line in ILLEGAL, and is then checked to be refused by that name.
"""

from __future__ import annotations

import copy
import importlib.util
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
from lora_cli.nn.quantized import STORAGES, QuantizedLinear, dequantize, quantize
from lora_cli.nn.variants import VARIANTS
from lora_cli.spec import AdaLoraSpec, LoraSpec

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
    storage: str | None = None
    """How its weight is kept, in place of plainly."""


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
QUANTIZED = tuple(f"Linear in {storage}" for storage in STORAGES)
if importlib.util.find_spec("bitsandbytes"):
    LAYERS |= {name: Layer(LAYERS["Linear"].make, biases=(True,), storage=name.split()[-1]) for name in QUANTIZED}
CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d", "Conv2d in groups")
PARTS = ("part of a Linear", "part of a Conv1D")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

ALL_LAYERS, ALL_VARIANTS, ALL_INITS = tuple(LAYERS), tuple(VARIANTS), tuple(INITS)
NOT_KAIMING = tuple(init for init in INITS if init != "kaiming")
OWN_WAYS, LINEAR_ONLY = ("vera", "dylora", "adalora"), ("vera", "adalora")
WHOLE = ("dora", *OWN_WAYS)
PLAIN = tuple(name for name in LAYERS if name not in QUANTIZED)
ILLEGAL: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], str], ...] = (
    (ALL_LAYERS, OWN_WAYS, NOT_KAIMING, r"lora.init=\w+: kaiming with lora.variant=\w+"),
    (("Embedding",), ("lora_fa",), ALL_INITS, r"lora.variant=lora_fa: not for an embedding"),
    (PARTS, WHOLE, ALL_INITS, r"lora.variant=\w+: not for parts of a fused projection"),
    (("Conv2d in groups",), WHOLE, ALL_INITS, r"lora.variant=\w+: not for a convolution in 2 groups"),
    (("Embedding", *CONVOLUTIONS), LINEAR_ONLY, ALL_INITS, r"lora.variant=\w+: only for linear layers"),
    (("Embedding",), ALL_VARIANTS, NOT_KAIMING[1:], r"lora.init=\w+: not for an embedding"),
    (CONVOLUTIONS, ALL_VARIANTS, ("eva",), r"lora.init=eva: not for a convolution"),
    (PLAIN, ALL_VARIANTS, ("loftq",), r"lora.init=loftq: only for layers that model.quantization has just quantised"),
)
"""Layers, variants, inits → what is said of each of them together."""
UNSCALED = ("vera", "adalora")
"""Variants without a choice of the scaling."""


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
        settings: dict[str, Any] = {"variant": self.variant, "init": self.init, "scaling": self.scaling}
        if self.variant != "vera":
            settings["alpha"] = ALPHA
        if self.variant == "adalora":
            settings["adalora"] = AdaLoraSpec(target_r=2)
        return LoraSpec(r=R, targets=[target], **settings)

    @property
    def refusal(self) -> str | None:
        if self.scaling != "alpha/r" and self.variant in UNSCALED:
            return r"lora.scaling=\S+: alpha/r with lora.variant=\w+"
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


METHODS = [(variant, init, "alpha/r") for variant in VARIANTS for init in INITS]
METHODS += [("lora", init, "alpha/sqrt(r)") for init in INITS]
METHODS += [(variant, "kaiming", "alpha/sqrt(r)") for variant in UNSCALED]
CASES = [Case(layer, *method, bias) for layer, base in LAYERS.items() for method in METHODS for bias in base.biases]
LEGAL = [case for case in CASES if case.refusal is None]
# No refusal looks at a bias.
REFUSED = [case for case in CASES if case.refusal is not None and case.bias == LAYERS[case.layer].biases[0]]
TYPED = [(case, dtype) for case in LEGAL for dtype in DTYPES if case.layer not in QUANTIZED or dtype != torch.float64]
"""Every case in every dtype that its weight can be kept in."""


def base_of(case: Case, dtype: torch.dtype = torch.float32, *, is_quantized: bool = True) -> OneLayer:
    """The same weights at each call."""
    model, generator = OneLayer(LAYERS[case.layer].make(case.bias)).eval(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5, generator=generator)
    if case.layer in PARTS:
        model.config = FusedConfig()
    storage = LAYERS[case.layer].storage
    if storage and is_quantized:
        quantize(model.to(dtype), storage, skip=(), device=torch.device("cpu"), keep_original=case.init == "loftq")
        return model
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


Update = Callable[..., Tensor]
"""(A, B, their rank, by default R) → s(rank)·B·A as (out, in), less what it was at the start if the init says so."""


def lora(layer: LoraLayer, matrix: Tensor, update: Update) -> Tensor:
    return matrix + update(layer.A, layer.B)


def dora(layer: LoraLayer, matrix: Tensor, update: Update) -> Tensor:
    direction = matrix + update(layer.A, layer.B)
    return torch.diag(layer.magnitude.to(matrix.dtype) / direction.detach().norm(dim=1)) @ direction


def vera(layer: LoraLayer, matrix: Tensor, update: Update) -> Tensor:
    return matrix + layer.lambda_b.diag() @ layer.B @ layer.lambda_d.diag() @ layer.A


def dylora(layer: LoraLayer, matrix: Tensor, update: Update) -> Tensor:
    b = layer.training_rank or R
    return matrix + update(layer.A[:b], layer.B[:, :b], b)


def adalora(layer: LoraLayer, matrix: Tensor, update: Update) -> Tensor:
    return matrix + ALPHA / (R + 1e-5) * layer.B @ layer.E.diag() @ layer.A


DENSE: dict[str, Callable[[LoraLayer, Tensor, Update], Tensor]] = {
    "lora": lora,
    "dora": dora,
    "lora_fa": lora,
    "vera": vera,
    "dylora": dylora,
    "adalora": adalora,
}
"""Variant → the effective weight (out, in) from (layer, base weight, update), as its paper has it."""


def dense(case: Case, layer: LoraLayer, start: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """The base with the paper's weight in the weight's place; `start` is (A, B) as they were drawn."""
    base = layer.base_layer
    if isinstance(base, QuantizedLinear):
        base = base.plain(base.matrix)
    weight = base.weight.detach()
    is_transposed = case.layer in ("Embedding", "transformers' Conv1D", "part of a Conv1D")
    matrix = weight.T if is_transposed else weight.flatten(1)

    def update(A: Tensor, B: Tensor, r: int = R) -> Tensor:
        # PiSSA and OLoRA: what they start from is off the base weight.
        rest = product(case, A, B) - (product(case, *start) if case.init in ("pissa", "olora") else 0.0)
        return ALPHA / (r if case.scaling == "alpha/r" else r**0.5) * rest.to(matrix.dtype)

    effective = DENSE[case.variant](layer, matrix, update)
    effective = effective.T if is_transposed else effective.view(weight.shape)
    return torch.func.functional_call(base, {"weight": effective}, (x,))


def test_every_variant_has_a_formula() -> None:
    assert DENSE.keys() == VARIANTS.keys()


def test_the_product_has_this_many_cases() -> None:
    print(f"{len(TYPED)} cases of {len(LEGAL)} combinations in {len(DTYPES)} dtypes; {len(REFUSED)} are refused")
    assert (len(TYPED), len(REFUSED)) == ((1378, 324) if QUANTIZED[0] in LAYERS else (1192, 284))


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_an_illegal_combination_is_refused_by_name(case: Case) -> None:
    model = base_of(case)
    with pytest.raises(ConfigError, match=case.refusal):
        inject(model, case.spec, groups={})
    assert not isinstance(model.attn.c_attn, LoraLayer)


@pytest.mark.parametrize(("case", "dtype"), TYPED, ids=lambda part: str(part).removeprefix("torch."))
def test_a_layer_starts_as_its_base_learns_as_its_paper_says_and_merges(case: Case, dtype: torch.dtype) -> None:
    model, x = adapted(case, dtype)[0], inputs_of(case, dtype)
    if case.init == "loftq":
        check_nearer(case, model)
    else:
        check_start(case, model, x)
    start = (layer_of(model).A.detach().clone(), layer_of(model).B.detach().clone())
    trained(model)
    check_what_trains(case, layer_of(model))
    if dtype in (torch.float32, torch.float64):
        # A narrow dtype would hide a wrong formula in its rounding.
        check_gradients(case, model, start, x)
    if case.variant == "dylora" and dtype == torch.float32:
        check_ranks(case, model, start, x)
    check_merge(model, x.detach())


@torch.no_grad()
def check_start(case: Case, model: OneLayer, x: Tensor) -> None:
    """Neutral: exactly, but for DoRA and the orthogonal init, which are so up to rounding."""
    ours, base = model(x), layer_of(model).base_layer(x)
    is_exact = case.variant != "dora" and case.init != "orthogonal"
    rounding = 0.0 if is_exact else 8 * max(torch.finfo(base.dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(ours, base, rtol=rounding, atol=rounding)


@torch.no_grad()
def check_nearer(case: Case, model: OneLayer) -> None:
    """LoftQ: not neutral, but nearer to the weight as it was, which is let go, than quantising it has left it."""
    layer, original = layer_of(model), base_of(case, is_quantized=False).attn.c_attn.weight
    found = VARIANTS[case.variant].merged_weight(layer)
    assert (found - original).norm() < 0.9 * (layer.matrix - original).norm()
    assert layer.base_layer.original is None


def check_what_trains(case: Case, layer: LoraLayer) -> None:
    names = {name for name, p in layer.named_parameters() if p.requires_grad}
    variant = VARIANTS[case.variant]
    assert names == {"A", "B", *variant.parameters} - set(variant.frozen)


def check_gradients(case: Case, model: nn.Module, start: tuple[Tensor, Tensor], x: Tensor) -> None:
    layer = model if isinstance(model, LoraLayer) else layer_of(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    inputs = [*parameters, *([x.requires_grad_()] if x.is_floating_point() else [])]
    ours, expected = model(x), dense(case, layer, start, x)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    target = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view_as(ours)
    gradients = torch.autograd.grad((ours - target).square().mean(), inputs)
    references = torch.autograd.grad((expected - target).square().mean(), inputs)
    for mine, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-5)


def check_ranks(case: Case, model: OneLayer, start: tuple[Tensor, Tensor], x: Tensor) -> None:
    """DyLoRA in training: the formula of the rank that was drawn. The model draws, so its layer is called."""
    layer = layer_of(model).train()
    assert layer.drawn_rank is not None
    for b in range(1, R + 1):
        layer.drawn_rank.current = b
        check_gradients(case, layer, start, x)
    model.eval()


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
    with torch.no_grad():
        assert torch.equal(again(inputs_of(case)), model(inputs_of(case)))
    if case.layer in QUANTIZED:
        # fp64 is for plain weights, and it shows the formula, not rounding.
        dequantize(base)
        load_adapter(model := copy.deepcopy(base), tmp_path / "adapter", fresh=[], fingerprint=None)
    base.config = None
    peft, x = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval(), inputs_of(case, torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(peft.double()(x), model.double()(x), rtol=1e-6, atol=1e-6)
