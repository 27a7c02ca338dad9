"""The classic API by itself: its formulas, and that what is broken in loralib is not here."""

from __future__ import annotations

import copy
import pickle
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import lora_cli.nn.loralib as lora
from lora_cli.errors import ConfigError, UnknownName

from .models import trained

LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda **o: lora.Linear(6, 4, r=2, lora_alpha=3, **o), (5, 6)),
    "Linear, transposed": (lambda **o: lora.Linear(6, 4, r=2, lora_alpha=3, fan_in_fan_out=True, **o), (5, 6)),
    "MergedLinear": (lambda **o: lora.MergedLinear(6, 9, r=2, enable_lora=[True, False, True], **o), (2, 5, 6)),
    "MergedLinear, transposed": (
        lambda **o: lora.MergedLinear(6, 9, r=2, enable_lora=[False, True, True], fan_in_fan_out=True, **o),
        (5, 6),
    ),
    "Conv1d": (lambda **o: lora.Conv1d(4, 6, 3, r=2, stride=2, padding=1, groups=2, **o), (2, 4, 9)),
    "Conv2d": (lambda **o: lora.Conv2d(4, 6, 3, r=2, lora_alpha=3, groups=2, **o), (2, 4, 7, 7)),
    "Conv2d, (3, 1)": (lambda **o: lora.Conv2d(4, 6, (3, 1), r=2, dilation=2, **o), (2, 4, 7, 7)),
    "Conv3d": (lambda **o: lora.Conv3d(4, 6, 3, r=1, padding=1, **o), (2, 4, 3, 4, 5)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def script_of_the_docs(folder: Path) -> Path:
    """The first block of docs/loralib.md, as a file."""
    page = (Path(__file__).parents[2] / "docs" / "loralib.md").read_text(encoding="utf-8")
    script = folder / "script.py"
    script.write_text(page.split("```python\n")[1].split("```")[0], encoding="utf-8")
    return script


def build(name: str, **options: Any) -> nn.Module:
    """Moved off its start, fp64."""
    torch.manual_seed(0)
    return trained(LAYERS[name][0](**options)).double()


def inputs(name: str) -> torch.Tensor:
    return torch.randn(LAYERS[name][1], generator=torch.Generator().manual_seed(1)).double()


def plain(layer: nn.Module) -> nn.Module:
    """torch's own layer with the merged weight."""
    state = lora.merged_state_dict(layer)
    if isinstance(layer, lora.ConvLoRA):
        twin = copy.deepcopy(layer.conv)
    else:
        twin = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        state = state | {"weight": state["weight"].T if layer.fan_in_fan_out else state["weight"]}
    twin.double().load_state_dict(state)
    return twin


@each_layer
def test_layer_computes_what_a_plain_one_does_with_the_merged_weight(name: str) -> None:
    layer, x = build(name), inputs(name)
    torch.testing.assert_close(layer(x), plain(layer)(x), atol=1e-6, rtol=1e-5)
    assert layer.delta_weight().shape == layer.weight.shape
    assert layer.delta_weight().count_nonzero() > 0


def test_merged_linear_is_a_linear_layer_for_each_enabled_part() -> None:
    layer, x = build("MergedLinear"), inputs("MergedLinear")
    first, last = (x @ A.T @ B.T for A, B in zip(layer.lora_A.chunk(2), layer.lora_B.chunk(2), strict=True))
    expected = layer.scaling * torch.cat([first, torch.zeros_like(first), last], -1)
    torch.testing.assert_close(layer(x), functional.linear(x, layer.weight, layer.bias) + expected)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 2),
    st.lists(st.integers(1, 3), min_size=3, max_size=3),
)
def test_update_of_any_convolution_has_the_kernels_numbers(
    size: int, groups: int, r: int, multiple: int, kernel: list[int]
) -> None:
    kind = {1: lora.Conv1d, 2: lora.Conv2d, 3: lora.Conv3d}[size]
    layer = kind(2 * groups, multiple * groups, tuple(kernel[:size]), r=r, groups=groups)
    trained(layer)
    x = torch.randn(1, 2 * groups, *[4] * size)
    torch.testing.assert_close(layer(x), layer.conv._conv_forward(x, layer.weight + layer.delta_weight(), layer.bias))
    flat = (layer.lora_B.double() @ layer.lora_A.double()).flatten() * layer.scaling
    torch.testing.assert_close(layer.delta_weight().flatten().double(), flat)


def test_embedding_adds_the_update_of_each_entry_and_never_that_of_padding() -> None:
    layer = trained(lora.Embedding(7, 4, r=2, padding_idx=1))
    numbers = torch.tensor([[0, 1, 6], [2, 1, 1]])
    expected = (layer.weight + layer.delta_weight())[numbers]
    torch.testing.assert_close(layer(numbers), expected)
    layer(numbers).sum().backward()
    assert layer.lora_A.grad.abs().sum(0).bool().tolist() == [True, False, True, False, False, False, True]


@each_layer
def test_new_layer_computes_what_its_frozen_weight_does(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name][0]()
    assert not layer.lora_B.any()
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    assert not layer.delta_weight().any()
    layer, x = layer.double(), inputs(name)
    torch.testing.assert_close(layer(x), plain(layer)(x))


@each_layer
def test_switching_between_train_and_eval_changes_nothing(name: str) -> None:
    layer, x = build(name).bfloat16(), inputs(name).bfloat16()
    before, expected = copy.deepcopy(layer.state_dict()), layer(x)
    for _ in range(20):
        layer.eval()
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
        layer.train()
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())


@each_layer
@pytest.mark.parametrize("is_saved_in_eval", [True, False])
def test_state_saved_in_any_mode_is_loaded_in_any_mode(name: str, is_saved_in_eval: bool) -> None:
    layer, other, x = build(name), LAYERS[name][0]().double(), inputs(name)
    state = {key: tensor.clone() for key, tensor in layer.train(not is_saved_in_eval).state_dict().items()}
    other.eval().load_state_dict(state)
    assert torch.equal(other(x), layer.eval()(x))
    assert torch.equal(other.train()(x), layer.train()(x))


@each_layer
def test_factors_changed_in_eval_take_effect_and_leave_the_weight_alone(name: str) -> None:
    layer, x = build(name).eval(), inputs(name)
    before, weight = layer(x), layer.weight.clone()
    layer.lora_B.data.mul_(2)
    assert not torch.allclose(layer(x), before)
    assert torch.equal(layer.train().weight, weight)


@each_layer
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layer_is_copied_and_pickled(name: str, dropout: float) -> None:
    layer, x = build(name, lora_dropout=dropout).eval(), inputs(name)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


@each_layer
def test_dropout_acts_on_the_updates_input_in_training_only(name: str) -> None:
    layer, x = build(name, lora_dropout=0.5), inputs(name)
    torch.manual_seed(3)
    dropped = functional.dropout(x, 0.5)
    torch.manual_seed(3)
    ours = layer.train()(x)
    update = build(name)(dropped) - without_update(layer)(dropped)
    torch.testing.assert_close(ours, without_update(layer)(x) + update)
    torch.testing.assert_close(layer.eval()(x), build(name)(x))


def without_update(layer: nn.Module) -> nn.Module:
    twin = copy.deepcopy(layer).eval()
    nn.init.zeros_(twin.lora_B)
    return twin


@pytest.mark.parametrize(
    "layer",
    [
        lora.Linear(6, 4, lora_dropout=0.5),
        lora.MergedLinear(6, 9, r=2),
        lora.MergedLinear(6, 9, enable_lora=[True, True, True]),
        lora.Conv2d(6, 4, 1),
        lora.Embedding(6, 4),
    ],
    ids=lambda layer: repr(layer)[:12],
)
def test_layer_without_rank_or_enabled_part_is_torchs_own_and_trains(layer: nn.Module) -> None:
    assert all(parameter.requires_grad for parameter in layer.parameters())
    assert {name.removeprefix("conv.") for name in layer.state_dict()} <= {"weight", "bias"}
    x = torch.ones(2, 6, dtype=torch.long) if isinstance(layer, nn.Embedding) else torch.ones(2, 6, 1, 1).squeeze()
    assert layer(x[..., None, None] if isinstance(layer, lora.ConvLoRA) else x).isfinite().all()


class Block(nn.Module):
    """Names that a substring would take for what they are not."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_like = nn.Linear(4, 4)
        self.relative_attention_bias = nn.Embedding(4, 2)
        self.adapted = lora.Linear(4, 4, r=2)
        self.image = lora.Conv2d(4, 4, 1, r=1)
        self.plain = lora.Linear(4, 4)


FACTORS = {"adapted.lora_A", "adapted.lora_B", "image.lora_A", "image.lora_B"}
TRAINED = {
    "none": FACTORS,
    "lora_only": FACTORS | {"adapted.bias", "image.conv.bias"},
    "all": FACTORS | {"adapted.bias", "image.conv.bias", "plain.bias", "lora_like.bias"},
}


@pytest.mark.parametrize("bias", TRAINED)
def test_what_trains_is_what_is_saved_and_is_chosen_by_structure(bias: str) -> None:
    model = Block()
    lora.mark_only_lora_as_trainable(model, bias=bias)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == TRAINED[bias]
    assert lora.lora_state_dict(model, bias=bias).keys() == TRAINED[bias]


def test_factor_frozen_by_hand_stays_frozen() -> None:
    model = Block()
    model.adapted.lora_A.requires_grad_(False)
    lora.mark_only_lora_as_trainable(model)
    assert not model.adapted.lora_A.requires_grad


def test_merged_state_is_that_of_torchs_own_layers() -> None:
    layers = [lora.Conv2d(4, 6, 3, r=2, bias=False), nn.Flatten(), lora.Linear(6, 4, r=2), lora.Linear(4, 2)]
    model = trained(nn.Sequential(*layers))
    own = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.Flatten(), nn.Linear(6, 4), nn.Linear(4, 2))
    own.load_state_dict(lora.merged_state_dict(model))
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(own(x), model(x))


def test_state_of_a_plain_convolution_and_of_newer_loralibs_is_loaded() -> None:
    layer, own = lora.Conv2d(4, 6, 3, r=2), nn.Conv2d(4, 6, 3)
    layer.load_state_dict(own.state_dict(), strict=False)
    assert torch.equal(layer.weight, own.weight)
    both = {f"{prefix}{name}": tensor for prefix in ("", "conv.") for name, tensor in own.state_dict().items()}
    nn.Sequential(layer).load_state_dict({f"0.{name}": t for name, t in (layer.state_dict() | both).items()})
    assert torch.equal(layer.bias, own.bias)


def test_nothing_is_kept_twice_so_that_safetensors_can_hold_it(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    model = nn.ModuleDict({name: build(name) for name in LAYERS if "," not in name})
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_own_layer_mixed_with_the_common_class_is_taken_for_one() -> None:
    class Scaled(nn.Linear, lora.LoRALayer):
        def __init__(self, size: int) -> None:
            nn.Linear.__init__(self, size, size)
            lora.LoRALayer.__init__(self, r=1, lora_alpha=1, lora_dropout=0.0, merge_weights=True)
            self.lora_E = nn.Parameter(torch.ones(size))

    model = nn.Sequential(Scaled(3))
    lora.mark_only_lora_as_trainable(model)
    assert lora.lora_state_dict(model).keys() == {"0.lora_E"}


def test_script_in_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script_of_the_docs(tmp_path)))
    assert float(capsys.readouterr().out) < 0.5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lora.Linear(4, 4, r=-1), ConfigError, "r=-1: 0 or more"),
        (lambda: lora.MergedLinear(4, 8, r=1, enable_lora=[True] * 3), ConfigError, "enable_lora=.*8 outputs"),
        (lambda: lora.lora_state_dict(nn.Linear(2, 2), "lora"), UnknownName, "bias=lora: no such choice"),
        (lambda: lora.mark_only_lora_as_trainable(nn.Linear(2, 2), "some"), UnknownName, "none"),
    ],
)
def test_what_cannot_be_meant_is_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
