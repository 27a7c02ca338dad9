"""Adapted convolutions against a dense formulation of our own, and against PEFT."""

from __future__ import annotations

import copy
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lora_cli.dropout import dropout
from lora_cli.errors import AdapterError, ConfigError
from lora_cli.nn.adapter import load_adapter, save_adapter
from lora_cli.nn.convolutions import LoraConvolution
from lora_cli.nn.inject import Injection, inject, merge, remove, unmerge
from lora_cli.nn.kinds import kind_of
from lora_cli.nn.layers import generator_for
from lora_cli.nn.passport import LOADS, WRONG, passport
from lora_cli.nn.stored import read_stored
from lora_cli.spec import LoraSpec

from .models import trained

# PEFT asks the hub for the base's config when it saves; there is no hub in a test.
os.environ["HF_HUB_OFFLINE"] = "1"

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
FUNCTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
MODES = ("zeros", "reflect", "replicate", "circular")


@st.composite
def bases(draw: st.DrawFn) -> nn.Module:
    """Convolutions of every geometry, small enough to be quick."""
    size = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    kernel = draw(st.tuples(*[st.integers(1, 3)] * size))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * size))
    mode = draw(st.sampled_from(MODES if size < 3 else ("zeros", "replicate", "circular")))
    is_same = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 99)))
    return CONVOLUTIONS[size](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride=1 if is_same else draw(st.tuples(*[st.integers(1, 3)] * size)),
        padding="same" if is_same else draw(st.tuples(*[st.integers(0, 2)] * size)),
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    ).double()


def adapted(base: nn.Module, r: int | None = None, **options: Any) -> LoraConvolution:
    """Moved off its start, fp64."""
    layer = LoraConvolution(base, r=r or 2 * base.groups, alpha=3.0, generator=generator_for(0, "layer"), **options)
    return trained(layer.double())  # type: ignore[return-value]


def images(base: nn.Module) -> torch.Tensor:
    size = len(base.kernel_size)
    shape = (2, base.in_channels, *range(6, 6 + size))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()


def effective(layer: LoraConvolution) -> torch.Tensor:
    """The weight, kernel by kernel: of output o in group g, W[o] + s·Σ_j B[o, j]·A[j of g]."""
    base = layer.base_layer
    per_group, ranks = base.out_channels // base.groups, layer.r // base.groups
    rows = []
    for number in range(base.out_channels):
        first = number // per_group * ranks
        kernels = [layer.B[number, j] * layer.A[first + j].view(base.weight[0].shape) for j in range(ranks)]
        update = base.weight[number] + layer.scaling * torch.stack(kernels).sum(0)
        if layer.variant == "dora":
            update = layer.magnitude[number] * update / update.detach().norm()
        rows.append(update)
    return torch.stack(rows)


def dense(layer: LoraConvolution, x: torch.Tensor) -> torch.Tensor:
    """The base with the effective weight in the weight's place, by functional's own padding."""
    base = layer.base_layer
    x = functional.pad(x, base._reversed_padding_repeated_twice, base.padding_mode.replace("zeros", "constant"))
    return FUNCTIONS[x.dim() - 2](
        x, effective(layer), base.bias, stride=base.stride, dilation=base.dilation, groups=base.groups
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=40, deadline=None)
@given(bases(), st.sampled_from(["lora", "dora"]))
def test_output_gradients_and_merged_weight_are_those_of_the_dense_formulation(base: nn.Module, variant: str) -> None:
    layer, x = adapted(base, variant=variant if base.groups == 1 else "lora"), images(base).requires_grad_()
    ours, expected = layer(x), dense(layer, x)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    parameters = [x, *(p for p in layer.parameters() if p.requires_grad)]
    target = torch.linspace(-1, 1, ours.numel()).view_as(ours)
    gradients = torch.autograd.grad(functional.mse_loss(ours, target), parameters)
    references = torch.autograd.grad(functional.mse_loss(expected, target), parameters)
    for mine, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-7, rtol=1e-5)
    before = base.weight.detach().clone()
    layer.merge()
    torch.testing.assert_close(base.weight, effective_of_merged(layer, before), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    layer.unmerge()
    assert torch.equal(base.weight, before)


def effective_of_merged(layer: LoraConvolution, before: torch.Tensor) -> torch.Tensor:
    twin = copy.deepcopy(layer)
    twin.unmerge()
    assert torch.equal(twin.base_layer.weight, before)
    return effective(twin)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=25, deadline=None)
@given(bases())
def test_new_layer_computes_exactly_what_its_base_does(base: nn.Module) -> None:
    layer, x = LoraConvolution(base, r=base.groups, alpha=1.0).double(), images(base)
    assert torch.equal(layer(x), base(x))
    assert layer.delta_weight().shape == layer.weight.shape == base.weight.shape


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_works_over_a_narrow_base_and_under_autocast(variant: str, dtype: torch.dtype) -> None:
    layer = LoraConvolution(nn.Conv2d(4, 6, 3, padding=1).to(dtype), r=3, alpha=3.0, variant=variant)
    trained(layer)
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    wide = copy.deepcopy(layer)
    wide.base_layer.float()
    narrow = layer(x.to(dtype))
    assert narrow.dtype == dtype
    torch.testing.assert_close(narrow.float(), wide(x), rtol=0.05, atol=0.1)
    narrow.float().square().sum().backward()
    assert layer.A.grad.dtype == layer.B.grad.dtype == torch.float32
    layer.merge()
    torch.testing.assert_close(layer(x.to(dtype)).float(), wide(x), rtol=0.05, atol=0.1)
    expected = wide(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(wide(x).float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_output_lies_in_memory_as_the_bases_does(variant: str, memory: torch.memory_format) -> None:
    layer = adapted(nn.Conv2d(3, 4, 3), r=2, variant=variant).to(memory_format=memory)
    x = images(layer.base_layer).to(memory_format=memory)
    assert layer(x).stride() == layer.base_layer(x).stride()


def test_image_without_a_batch_is_taken() -> None:
    layer = adapted(nn.Conv2d(3, 4, 3), r=2, variant="dora")
    x = images(layer.base_layer)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


def test_dropout_acts_on_the_input_of_a_only() -> None:
    layer = adapted(nn.Conv1d(2, 4, 3, bias=False), r=2, dropout=0.5).train()
    x = images(layer.base_layer)
    torch.manual_seed(11)
    ours = layer(x)
    torch.manual_seed(11)
    update = functional.conv1d(dropout(x, 0.5), layer.delta_weight().double())
    torch.testing.assert_close(ours, layer.base_layer(x) + update, atol=1e-6, rtol=1e-5)


def test_init_is_that_of_torchs_convolution_of_the_same_inputs() -> None:
    layer = LoraConvolution(nn.Conv2d(8, 6, 3), r=4, alpha=1.0, generator=generator_for(0, "layer"))
    assert layer.A.abs().max() <= 1 / math.sqrt(8 * 9)
    assert layer.A.std().item() == pytest.approx(1 / math.sqrt(3 * 8 * 9), rel=0.1)
    assert not layer.B.any()


class Standardised(nn.Conv2d):
    """A convolution with another forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def test_what_computes_something_else_is_no_base() -> None:
    assert kind_of(nn.ConvTranspose2d(3, 4, 3)) is None
    assert kind_of(Standardised(3, 4, 3)) is None
    assert kind_of(nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 3))) is None


class Net(nn.Module):
    """A convolutional net of one dimensionality, with groups or dilation if asked."""

    def __init__(self, size: int = 2, groups: int = 1, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(5)
        kind = CONVOLUTIONS[size]
        self.first = kind(3, 6, 3, stride=2, padding=1)
        self.second = kind(6, 6, (2, 3, 1)[:size], padding=1, groups=groups, bias=False, **options)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.second(functional.gelu(self.first(x)))
        result: torch.Tensor = self.head(hidden.flatten(2).mean(2))
        return result


def outputs(model: nn.Module, size: int) -> torch.Tensor:
    x = torch.randn(2, 3, *[7] * size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        result: torch.Tensor = model.double()(x.double())
    return result


SPEC: dict[str, Any] = {"r": 4, "alpha": 6.0, "targets": ["first", "second", "head"]}


def ours(net: nn.Module, folder: Path, **spec: Any) -> Injection:
    injection = inject(net, LoraSpec(**(SPEC | spec)), groups={})
    trained(net)
    save_adapter(net, injection, folder, base_name="net", revision=None, task_type=None, fingerprint=None, extra={})
    return injection


def peft_of(net: nn.Module, folder: Path, **config: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    defaults = {"r": 4, "lora_alpha": 6, "target_modules": SPEC["targets"], "init_lora_weights": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, on groups
        model = get_peft_model(net, LoraConfig(**(defaults | config)))
    trained(model, 5).save_pretrained(folder)
    return model.eval()


def into_peft(net: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, on groups
        return PeftModel.from_pretrained(net, str(folder)).eval()


FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, {}),
    "rslora": ({"scaling": "alpha/sqrt(r)"}, {"use_rslora": True}),
    "dora": ({"variant": "dora"}, {"use_dora": True}),
    "patterns and biases": (
        {"rank_pattern": {"second": 2}, "bias": "lora_only"},
        {"rank_pattern": {"second": 2}, "bias": "lora_only"},
    ),
}


@pytest.mark.parametrize("size", CONVOLUTIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers")
def test_peft_and_we_compute_the_same_from_either_ones_files(form: str, size: int, tmp_path: Path) -> None:
    spec, config = FORMS[form]
    net, again = Net(size), Net(size)
    ours(net, tmp_path / "ours", **spec)
    load_adapter(again, tmp_path / "ours", fresh=[], fingerprint=None)
    expected = outputs(net, size)
    torch.testing.assert_close(outputs(again, size), expected, rtol=0, atol=0)
    torch.testing.assert_close(outputs(into_peft(Net(size), tmp_path / "ours"), size), expected, rtol=0, atol=1e-6)
    peft, from_peft = peft_of(Net(size), tmp_path / "peft", **config), Net(size)
    load_adapter(from_peft, tmp_path / "peft", fresh=[], fingerprint=None)
    torch.testing.assert_close(outputs(from_peft, size), outputs(peft, size), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", CONVOLUTIONS)
def test_adapter_of_a_grouped_convolution_is_the_same_in_peft_and_comes_back(size: int, tmp_path: Path) -> None:
    net, again = Net(size, groups=2), Net(size, groups=2)
    ours(net, tmp_path, targets=["second"])
    load_adapter(again, tmp_path, fresh=[], fingerprint=None)
    expected = outputs(net, size)
    torch.testing.assert_close(outputs(again, size), expected, rtol=0, atol=0)
    peft = into_peft(Net(size, groups=2), tmp_path)
    torch.testing.assert_close(outputs(peft, size), expected, rtol=0, atol=1e-6)
    merge(net)
    torch.testing.assert_close(outputs(net, size), expected, rtol=0, atol=1e-5)
    unmerge(net)
    torch.testing.assert_close(outputs(net, size), expected, rtol=0, atol=0)


def test_stored_factors_of_convolutions_give_the_layers_update(tmp_path: Path) -> None:
    net = Net(groups=2)
    ours(net, tmp_path)
    stored = read_stored(tmp_path)
    assert passport(stored)["peft"].verdict == LOADS
    torch.testing.assert_close(stored.layers["first"].delta().float(), net.first.delta_matrix())
    grouped = stored.layers["second"].delta().view(2, 3, 2, -1).float()
    torch.testing.assert_close(grouped[[0, 1], :, [0, 1]].reshape(6, -1), net.second.delta_matrix())
    assert not grouped[[0, 1], :, [1, 0]].any()


def test_pefts_grouped_update_that_is_none_of_the_weight_is_refused(tmp_path: Path) -> None:
    peft_of(Net(groups=2), tmp_path, target_modules=["second"])
    with pytest.raises(AdapterError, match=r"second.A reaches the inputs of other groups"):
        load_adapter(Net(groups=2), tmp_path, fresh=[], fingerprint=None)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding_mode": "reflect"}], ids=["dilation", "padding mode"])
def test_geometry_that_peft_leaves_out_comes_back_and_is_refused_from_peft(
    options: dict[str, Any], tmp_path: Path
) -> None:
    net, again = Net(**options), Net(**options)
    ours(net, tmp_path)
    load_adapter(again, tmp_path, fresh=[], fingerprint=None)
    torch.testing.assert_close(outputs(again, 2), outputs(net, 2), rtol=0, atol=0)
    facts = json.loads((tmp_path / "lora.json").read_text())
    assert list(facts["unlike_peft"]) == ["second"]
    assert passport(read_stored(tmp_path))["peft"].verdict == WRONG
    (tmp_path / "lora.json").unlink()
    with pytest.raises(AdapterError, match=r"second: a convolution .*, which PEFT's update of it does not have"):
        load_adapter(Net(**options), tmp_path, fresh=[], fingerprint=None)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 3}, r"lora.r.*a multiple of 2 for second, a convolution in 2 groups"),
    "large rank": ({"r": 14}, r"at most 6 for second"),
    "pattern": ({"rank_pattern": {"second": 3}}, r"lora.rank_pattern.*a multiple of 2"),
    "variant": ({"variant": "dora"}, r"lora.variant.*not for a convolution in 2 groups \(second\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_groups_do_not_allow_are_refused(case: str) -> None:
    spec, message = REFUSED[case]
    net = Net(groups=2)
    with pytest.raises(ConfigError, match=message):
        inject(net, LoraSpec(**(SPEC | {"targets": ["second"]} | spec)), groups={})
    assert isinstance(net.second, nn.Conv2d)


def test_depthwise_convolution_takes_a_rank_above_its_kernel() -> None:
    net = nn.Sequential(nn.Conv1d(8, 8, 3, groups=8))
    inject(net, LoraSpec(r=8, targets=["0"]), groups={})
    assert (tuple(net[0].A.shape), tuple(net[0].B.shape)) == ((8, 3), (8, 1))
    with pytest.raises(ConfigError, match="at most 8"):
        inject(nn.Sequential(nn.Conv1d(8, 8, 3, groups=8)), LoraSpec(r=16, targets=["0"]), groups={})


def test_all_linear_leaves_convolutions_out_and_says_so() -> None:
    net = Net()
    assert inject(net, LoraSpec(r=2, targets=["all-linear"]), groups={}).left_out == ("first", "second")
    remove(net)
    assert inject(net, LoraSpec(r=2, targets=["all-linear", "first"]), groups={}).left_out == ("second",)
    remove(net)
    assert isinstance(net.first, nn.Conv2d)
