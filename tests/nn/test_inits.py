"""Where A and B start: against PEFT, against a singular value decomposition, and on the way to disk and back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.errors import ConfigError
from lora_cli.nn.adapter import load_adapter, save_adapter
from lora_cli.nn.convolutions import LoraConvolution
from lora_cli.nn.eva import start_from_inputs
from lora_cli.nn.inits import INITS
from lora_cli.nn.inject import (
    Injection,
    adapted_layers,
    inject,
    load_trainable_state,
    merge,
    trainable_state,
    unmerge,
)
from lora_cli.nn.kinds import kind_of
from lora_cli.nn.layers import LoraConv1D, LoraLayer, LoraLinear, generator_for
from lora_cli.spec import INITS as INIT_NAMES
from lora_cli.spec import LoraSpec

from .models import FRESH, lm_logits, logits, tiny, tiny_lm, trained

# PEFT asks the hub for the base's config when it saves; there is no hub in a test.
os.environ["HF_HUB_OFFLINE"] = "1"

RESIDUAL = [name for name, init in INITS.items() if init.is_residual]
NUM_IN, NUM_OUT, R = 12, 9, 4


def linear() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(NUM_IN, NUM_OUT)


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(3)
    return Conv1D(NUM_OUT, NUM_IN)


def build(base: nn.Module, init: str, **options: Any) -> LoraLayer:
    kind = kind_of(base)
    assert kind is not None
    return kind(base, r=R, alpha=6.0, init=init, generator=generator_for(0, "layer"), **options)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, NUM_IN, generator=torch.Generator().manual_seed(0))


def in_peft(base: nn.Module, init: str, **config: Any) -> nn.Module:
    """The layer that PEFT makes of `base`."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=R, lora_alpha=6, target_modules=["0"], init_lora_weights=init, **config)
    return get_peft_model(nn.Sequential(base), settings).base_model.model[0]


def after_one_step(layer: nn.Module, A: nn.Parameter, B: nn.Parameter, x: torch.Tensor) -> torch.Tensor:
    """B·A after a step of gradient descent."""
    (layer(x) - 1).square().sum().backward()
    return (B - 0.01 * B.grad) @ (A - 0.01 * A.grad)  # type: ignore[operator]


def test_table_holds_the_names_of_the_spec() -> None:
    assert tuple(INITS) == INIT_NAMES
    assert RESIDUAL == ["pissa", "olora"]


@pytest.mark.parametrize("init", [name for name in INITS if name != "orthogonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_init_but_orthogonal_starts_at_exactly_the_base(init: str, dtype: torch.dtype, x: torch.Tensor) -> None:
    layer = build(linear().to(dtype), init)
    assert torch.equal(layer(x.to(dtype)), layer.base_layer(x.to(dtype)))
    assert torch.equal(layer.weight, layer.base_layer.weight)


def test_orthogonal_starts_at_the_base_up_to_rounding_though_neither_factor_is_zero(x: torch.Tensor) -> None:
    layer = build(linear(), "orthogonal")
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=0, atol=1e-6)
    assert layer.A.abs().min() > 0
    assert layer.B.abs().min() > 0


@pytest.mark.parametrize("init", RESIDUAL)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_residual_init_starts_and_learns_as_in_peft(init: str, use_rslora: bool, x: torch.Tensor) -> None:
    layer = build(linear(), init, scaling="alpha/sqrt(r)" if use_rslora else "alpha/r")
    peft = in_peft(linear(), init, use_rslora=use_rslora)
    A, B = peft.lora_A["default"].weight, peft.lora_B["default"].weight
    # Singular vectors have no sign: products are compared.
    torch.testing.assert_close(layer.B @ layer.A, B @ A)
    torch.testing.assert_close(layer(x), peft(x))
    torch.testing.assert_close(after_one_step(layer, layer.A, layer.B, x), after_one_step(peft, A, B, x))


def test_pissa_on_gpt2s_layers_is_pefts(x: torch.Tensor) -> None:
    layer, peft = build(conv1d(), "pissa"), in_peft(conv1d(), "pissa", fan_in_fan_out=True)
    assert isinstance(layer, LoraConv1D)
    torch.testing.assert_close(layer.B @ layer.A, peft.lora_B["default"].weight @ peft.lora_A["default"].weight)


def test_pissa_starts_with_the_best_update_of_its_rank() -> None:
    layer = build(linear(), "pissa")
    values = torch.linalg.svdvals(layer.base_layer.weight)
    rest = layer.base_layer.weight - layer.scaling * layer.B @ layer.A
    torch.testing.assert_close(torch.linalg.svdvals(rest)[: NUM_OUT - R], values[R:])
    torch.testing.assert_close(layer.A.norm(dim=1), layer.B.norm(dim=0))


def test_olora_starts_with_an_orthonormal_b() -> None:
    layer = build(linear(), "olora")
    torch.testing.assert_close(layer.B.T @ layer.B, torch.eye(R))
    torch.testing.assert_close((layer.B @ layer.A)[:, :R], layer.base_layer.weight[:, :R])


@pytest.mark.parametrize(("init", "std"), [("gaussian", 1 / R), ("orthogonal", 0.1 * 2**-0.5)])
def test_drawn_inits_are_distributed_as_pefts(init: str, std: float) -> None:
    layer = build(nn.Linear(4096, 2048), init)
    peft = in_peft(nn.Linear(4096, 2048), init)
    for ours, theirs in ((layer.A, peft.lora_A["default"].weight), (layer.B, peft.lora_B["default"].weight)):
        # Four rows of one Q: their share of the whole is a matter of luck.
        assert ours.norm().item() == pytest.approx(theirs.norm().item(), rel=0.05)
    assert layer.A.square().mean().sqrt().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_draws_depend_on_seed_and_name_alone(init: str) -> None:
    first, again = build(linear(), init), build(linear(), init)
    assert torch.equal(first.A, again.A)
    assert torch.equal(first.B, again.B)
    other = LoraLinear(linear(), r=R, alpha=6.0, init=init, generator=generator_for(1, "layer"))
    assert not torch.equal(first.A, other.A)


def test_kaiming_draws_for_parts_what_it_would_for_the_stack() -> None:
    model = tiny_lm("gpt2")
    inject(model, LoraSpec(targets=["c_attn:q+v"], r=2), groups={}, seed=3)
    layer = adapted_layers(model)["transformer.h.1.attn.c_attn"]
    expected = nn.init.kaiming_uniform_(
        torch.zeros(4, 16), a=5**0.5, generator=generator_for(3, "transformer.h.1.attn.c_attn")
    )
    assert torch.equal(layer.A, expected)


@pytest.mark.parametrize("init", RESIDUAL)
def test_each_part_starts_from_its_own_outputs(init: str) -> None:
    model = tiny_lm("gpt2")
    inject(model, LoraSpec(targets=["c_attn:q+v"], r=2, init=init), groups={})
    layer = adapted_layers(model)["transformer.h.0.attn.c_attn"]
    value = LoraLinear(nn.Linear(16, 16), r=2, alpha=16.0)
    value.base_layer.weight.data = layer.matrix[32:].clone()
    alone = LoraLinear(value.base_layer, r=2, alpha=16.0, init=init)
    torch.testing.assert_close(layer.B[16:] @ layer.A[2:], alone.B @ alone.A)


@pytest.mark.parametrize("init", RESIDUAL)
def test_each_group_of_a_convolution_starts_from_its_own_outputs(init: str) -> None:
    torch.manual_seed(0)
    base = nn.Conv2d(6, 8, 3, groups=2)
    layer = LoraConvolution(base, r=4, alpha=4.0, init=init)
    alone = LoraLinear(nn.Linear(27, 4, bias=False), r=2, alpha=2.0)
    alone.base_layer.weight.data = layer.matrix[4:].clone()
    alone = LoraLinear(alone.base_layer, r=2, alpha=2.0, init=init)
    torch.testing.assert_close(layer.B[4:] @ layer.A[2:], alone.B @ alone.A)


def save(model: nn.Module, injection: Injection, folder: Path, task_type: str | None) -> None:
    options = {"base_name": None, "revision": None, "fingerprint": None, "extra": {}}
    save_adapter(model, injection, folder, task_type=task_type, **options)


def encoder() -> nn.Module:
    return tiny("bert")


def decoder() -> nn.Module:
    return tiny_lm("gpt2")


SAVED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (encoder, {"targets": ["query", "value"]}),
    "rslora": (encoder, {"targets": ["query", "dense"], "scaling": "alpha/sqrt(r)", "r": 3, "alpha": 2.5}),
    "dora": (encoder, {"targets": ["query"], "variant": "dora"}),
    "frozen A": (encoder, {"targets": ["query"], "variant": "lora_fa"}),
    "patterns": (encoder, {"targets": ["query"], "rank_pattern": {"layer.0.attention.self.query": 2}}),
    "conv1d": (decoder, {"targets": ["c_attn", "c_fc"]}),
    "parts": (decoder, {"targets": ["c_attn:q+v"], "r": 2}),
    "parts, rslora": (decoder, {"targets": ["c_attn:v"], "scaling": "alpha/sqrt(r)"}),
}


@pytest.mark.parametrize("init", RESIDUAL)
@pytest.mark.parametrize("case", SAVED)
def test_residual_adapter_is_saved_with_twice_the_rank_for_the_base_as_it_was(
    case: str, init: str, tmp_path: Path
) -> None:
    from peft import PeftModel

    make, spec = SAVED[case]
    compute, fresh, task = (logits, FRESH["bert"], "SEQ_CLS") if make is encoder else (lm_logits, (), "CAUSAL_LM")
    model, again = make(), make()
    injection = inject(model, LoraSpec(**({"r": 4, "alpha": 6.0, "init": init} | spec)), groups={}, fresh=fresh)
    torch.testing.assert_close(compute(model), compute(again), rtol=0, atol=1e-6)
    save(trained(model), injection, tmp_path / "adapter", task)
    loaded = load_adapter(again, tmp_path / "adapter", fresh=fresh, fingerprint=None)
    assert [row.ranks for row in loaded.rows] == [tuple(2 * r for r in row.ranks) for row in injection.rows]
    assert torch.equal(compute(again), compute(model))
    peft = PeftModel.from_pretrained(make(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(compute(peft.double()), compute(model.double()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("init", RESIDUAL)
def test_residual_adapter_merges_unmerges_and_resumes_bit_for_bit(init: str) -> None:
    model, again = encoder(), encoder()
    for each in (model, again):
        inject(each, LoraSpec(targets=["all-linear"], r=4, init=init), groups={}, fresh=FRESH["bert"], seed=1)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}
    after = logits(trained(model))
    assert not any("A0" in name or "B0" in name for name in model.state_dict())
    load_trainable_state(again, trainable_state(model))
    assert torch.equal(logits(again), after)
    merge(model)
    torch.testing.assert_close(logits(model), after, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in base.items())
    assert torch.equal(logits(model), after)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "odd rank": ({"init": "orthogonal", "r": 3}, r"lora.r=3: an even number with lora.init=orthogonal"),
    "odd rank of a layer": ({"init": "orthogonal", "rank_pattern": {"q_proj": 5}}, r"lora.rank_pattern.q_proj=5: an"),
    "nothing to start": ({"init": "pissa", "variant": "full", "targets": []}, r"lora.init=pissa: .*lora.variant=full"),
    "twice too large": ({"init": "pissa", "r": 2049}, r"lora.r=2049: .* 2048 with lora.init=pissa"),
    "twice too strong": ({"init": "olora", "alpha": 6000.0}, r"lora.alpha=6000.0: .* 5000 with lora.init=olora"),
    "twice the layer": ({"init": "pissa", "r": 9, "targets": ["q_proj"]}, r"lora.r=9: at most 8 .* 16 × 16 with"),
    "embedding": ({"init": "olora", "r": 2, "targets": ["embed_tokens"]}, r"lora.init=olora: not for an embedding \("),
    "eva of an embedding": ({"init": "eva", "targets": ["embed_tokens"]}, r"lora.init=eva: not for an embedding"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_init_cannot_start_is_refused_by_name(case: str) -> None:
    spec, says = REFUSED[case]
    model = tiny_lm("llama", tie_word_embeddings=False)
    with pytest.raises(ConfigError, match=says):
        inject(model, LoraSpec(**spec), groups={"default": ["q_proj"]})
    assert not adapted_layers(model)


@pytest.mark.parametrize(
    ("init", "r", "says"),
    [("eva", 4, "not for a convolution"), ("orthogonal", 2, "needs an even rank in each group; 0 has 1")],
)
def test_what_an_init_cannot_start_in_a_convolution_is_refused(init: str, r: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        inject(nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), LoraSpec(targets=["0"], r=r, init=init), groups={})


class TestEva:
    """The init that reads inputs."""

    @pytest.fixture
    def batches(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(1, 40, (1, length), generator=generator) for length in (3, 9, 14, 20, 24)]

    def adapted(self, batches: list[torch.Tensor], **spec: Any) -> nn.Module:
        model = tiny("bert")
        settings = {"targets": ["query", "value", "output.dense"], "r": 4, "init": "eva"} | spec
        inject(model, LoraSpec(**settings), groups={}, fresh=FRESH["bert"])
        start_from_inputs(model, [lambda ids=ids: model(input_ids=ids) for ids in batches])
        return model

    def test_rows_of_a_are_the_largest_singular_vectors_of_all_inputs(self, batches: list[torch.Tensor]) -> None:
        model, plain = self.adapted(batches), tiny("bert")
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in adapted_layers(model)}
        for name, rows in seen.items():
            plain.get_submodule(name).register_forward_pre_hook(lambda m, x, rows=rows: rows.append(x[0].flatten(0, 1)))
        for ids in batches:
            plain(input_ids=ids)
        for name, layer in adapted_layers(model).items():
            vectors = torch.linalg.svd(torch.cat(seen[name]).double()).Vh[:4]
            alignment = (layer.A.double() * vectors).sum(1).abs()
            torch.testing.assert_close(alignment, torch.ones_like(alignment), rtol=0, atol=1e-4)
            assert not layer.B.any()

    def test_layers_with_one_input_start_alike_and_the_model_as_its_base(self, batches: list[torch.Tensor]) -> None:
        model = self.adapted(batches)
        layers = adapted_layers(model)
        query, value = (layers[f"bert.encoder.layer.1.attention.self.{name}"] for name in ("query", "value"))
        assert torch.equal(query.A, value.A)
        assert torch.equal(logits(model), logits(tiny("bert")))
        again = adapted_layers(self.adapted(batches))
        assert all(torch.equal(layer.A, again[name].A) for name, layer in layers.items())

    def test_parts_share_their_input(self, batches: list[torch.Tensor]) -> None:
        model = tiny_lm("gpt2")
        inject(model, LoraSpec(targets=["c_attn:q+v"], r=2, init="eva"), groups={})
        start_from_inputs(model, [lambda ids=ids: model(input_ids=ids) for ids in batches])
        layer = adapted_layers(model)["transformer.h.0.attn.c_attn"]
        assert torch.equal(layer.A[:2], layer.A[2:])
        torch.testing.assert_close(layer.A[:2] @ layer.A[:2].T, torch.eye(2))

    def test_too_few_inputs_are_refused_by_name(self) -> None:
        with pytest.raises(ConfigError, match=r"lora.init=eva: .*query was given 0 inputs, fewer than its rank \(4\)"):
            self.adapted([])
