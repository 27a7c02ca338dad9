"""Beside loralib itself: the same script, once with each, from the same seed."""

from __future__ import annotations

import inspect
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import lora_cli.nn.loralib as ours

from .models import trained
from .test_loralib import script_of_the_docs

theirs: ModuleType = pytest.importorskip("loralib", reason="loralib is not installed: pip install loralib")
WAYS = {"from theirs to ours": (theirs, ours), "from ours to theirs": (ours, theirs)}
each_way = pytest.mark.parametrize(("source", "target"), WAYS.values(), ids=WAYS)


class Block(nn.Module):
    """As in microsoft/LoRA's GPT-2: one transposed projection to query, key and value, of which two are adapted."""

    def __init__(self, lora: ModuleType, size: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.norm_2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.c_attn = lora.MergedLinear(
            size,
            3 * size,
            r=3,
            lora_alpha=24,
            lora_dropout=dropout,
            enable_lora=[True, False, True],
            fan_in_fan_out=True,
            merge_weights=False,
        )
        self.c_fc = lora.Linear(size, 2 * size, r=2, lora_alpha=4)
        self.c_proj = lora.Linear(2 * size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.c_attn(self.norm(x)).chunk(3, -1)
        x = x + functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.c_proj(functional.gelu(self.c_fc(self.norm_2(x))))


class GPT2(nn.Module):
    def __init__(self, lora: ModuleType, dropout: float = 0.1) -> None:
        super().__init__()
        self.wte = lora.Embedding(20, 12, r=2, lora_alpha=2)
        self.blocks = nn.Sequential(Block(lora, 12, dropout), Block(lora, 12, dropout))
        self.head = nn.Linear(12, 20)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.blocks(self.wte(numbers)))
        return result.flatten(0, 1)


class ConvNet(nn.Sequential):
    def __init__(self, lora: ModuleType) -> None:
        super().__init__(
            lora.Conv2d(2, 6, 3, r=2, lora_alpha=4, padding=1),
            nn.ReLU(),
            lora.Conv2d(6, 6, kernel_size=3, r=1, stride=2, groups=2, bias=False),
            nn.Flatten(),
            lora.Linear(54, 5, r=4),
        )


def examples(kind: type[nn.Module]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    if kind is GPT2:
        numbers = torch.randint(20, (4, 9), generator=generator)
        return numbers[:, :-1], numbers[:, 1:].flatten()
    return torch.randn(6, 2, 8, 8, generator=generator), torch.randint(5, (6,), generator=generator)


def script(lora: ModuleType, kind: type[nn.Module], **options: Any) -> tuple[nn.Module, list[float]]:
    """A training as one writes it with loralib, with an evaluation in between."""
    torch.manual_seed(0)
    model = kind(lora, **options)
    lora.mark_only_lora_as_trainable(model, bias="all")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, y = examples(kind)
    losses = []
    for step in range(20):
        loss = functional.cross_entropy(model.train()(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 9:
            with torch.no_grad():
                losses.append(functional.cross_entropy(model.eval()(x), y).item())
    return model, losses


@pytest.mark.parametrize("kind", [GPT2, ConvNet])
def test_script_has_equal_losses_with_both(kind: type[nn.Module]) -> None:
    model, losses = script(ours, kind)
    peer, expected = script(theirs, kind)
    assert losses == pytest.approx(expected, rel=0, abs=1e-6)
    assert losses[-1] < 0.9 * losses[0]
    assert model.state_dict().keys() == peer.state_dict().keys()


def test_script_in_the_docs_prints_the_same_with_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = script_of_the_docs(tmp_path)
    runpy.run_path(str(path))
    expected, factors = capsys.readouterr().out, read(tmp_path / "lora.pt")
    path.write_text(path.read_text().replace("import lora_cli.nn.loralib as lora", "import loralib as lora"))
    runpy.run_path(str(path))
    assert capsys.readouterr().out == expected
    for key, tensor in read(tmp_path / "lora.pt").items():
        torch.testing.assert_close(factors[key], tensor, rtol=0, atol=1e-5)


@each_way
@pytest.mark.parametrize("kind", [GPT2, ConvNet])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_factors_saved_by_one_are_loaded_by_the_other(
    kind: type[nn.Module], bias: str, source: ModuleType, target: ModuleType, tmp_path: Path
) -> None:
    model = trained(kind(source))
    torch.save(source.lora_state_dict(model, bias=bias), tmp_path / "lora.pt")
    torch.save(model.train().state_dict(), tmp_path / "base.pt")
    torch.manual_seed(9)
    other = kind(target)
    other.load_state_dict({k: v for k, v in read(tmp_path / "base.pt").items() if "lora_" not in k}, strict=False)
    report = other.load_state_dict(read(tmp_path / "lora.pt"), strict=False)
    assert not report.unexpected_keys
    assert not [key for key in report.missing_keys if "lora_" in key]
    assert_same(other, model, kind)


@each_way
@pytest.mark.parametrize("kind", [GPT2, ConvNet])
def test_whole_state_saved_by_one_is_loaded_strictly_by_the_other(
    kind: type[nn.Module], source: ModuleType, target: ModuleType, tmp_path: Path
) -> None:
    model, other = trained(kind(source)), kind(target)
    torch.save(model.train().state_dict(), tmp_path / "model.pt")
    other.load_state_dict(read(tmp_path / "model.pt"))
    assert_same(other, model, kind)


def test_state_that_we_save_in_eval_is_loaded_right_by_loralib(tmp_path: Path) -> None:
    model, other = trained(ConvNet(ours)).eval(), ConvNet(theirs)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(read(tmp_path / "model.pt"))
    assert_same(other, model, ConvNet)


def read(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def assert_same(one: nn.Module, other: nn.Module, kind: type[nn.Module]) -> None:
    x, _ = examples(kind)
    with torch.no_grad():
        torch.testing.assert_close(one.eval()(x), other.eval()(x), rtol=0, atol=2e-6 * other(x).abs().max().item())


MAKERS: dict[str, Any] = {
    "Linear": lambda lora: lora.Linear(5, 4, r=2),
    "Linear, transposed": lambda lora: lora.Linear(5, 4, r=2, fan_in_fan_out=True, bias=False),
    "Linear, r=0": lambda lora: lora.Linear(5, 4),
    "MergedLinear": lambda lora: lora.MergedLinear(5, 12, 2, 3, 0.0, [True, False, True]),
    "Embedding": lambda lora: lora.Embedding(7, 4, 2, padding_idx=1),
    "Conv1d": lambda lora: lora.Conv1d(4, 6, 1, r=2),
    "Conv2d": lambda lora: lora.Conv2d(4, 6, 3, 2, 3, 0.0, groups=2),
    "ConvLoRA": lambda lora: lora.ConvLoRA(nn.Conv2d, 4, 6, 3, r=2),
}


@pytest.mark.parametrize("name", MAKERS)
def test_layer_from_a_seed_is_the_same_to_the_bit(name: str) -> None:
    torch.manual_seed(3)
    mine, mine_after = MAKERS[name](ours), torch.rand(1)
    torch.manual_seed(3)
    peer, peer_after = MAKERS[name](theirs), torch.rand(1)
    assert mine.state_dict().keys() == peer.state_dict().keys()
    assert all(torch.equal(tensor, peer.state_dict()[key]) for key, tensor in mine.state_dict().items())
    assert torch.equal(mine_after, peer_after)
    assert getattr(mine, "scaling", None) == getattr(peer, "scaling", None)
    trained_ones = [[name for name, p in layer.named_parameters() if p.requires_grad] for layer in (mine, peer)]
    assert trained_ones[0] == trained_ones[1]


NAMES = ("LoRALayer", "Linear", "Embedding", "MergedLinear", "ConvLoRA", "Conv1d", "Conv2d", "Conv3d")


@pytest.mark.parametrize("name", [*NAMES, "mark_only_lora_as_trainable", "lora_state_dict"])
def test_arguments_have_loralibs_names_order_and_defaults(name: str) -> None:
    mine, peer = ([*inspect.signature(getattr(lora, name)).parameters.values()] for lora in (ours, theirs))
    assert [(p.name, p.kind) for p in mine] == [(p.name, p.kind) for p in peer]
    assert [as_list(p.default) for p in mine] == [as_list(p.default) for p in peer]


def as_list(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default
