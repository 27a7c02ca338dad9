"""Quantised layers: what is kept, what is computed with it, and adapters over it."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("bitsandbytes", reason="the extra 'quant' is not installed")

from lora_cli.engine.memory import footprint
from lora_cli.engine.selfcheck import Movement
from lora_cli.errors import AdapterError, ConfigError, TrainingFailure
from lora_cli.nn import (
    dequantize,
    fingerprint,
    inject,
    load_adapter,
    merge,
    quantize,
    quantized_layers,
    quantized_size,
    remove,
    save_adapter,
    unmerge,
)
from lora_cli.nn.kinds import kind_of, matrix_of, shape_of
from lora_cli.nn.layers import generator_for
from lora_cli.nn.quantized import STORAGES, LoraQuantizedLinear, QuantizedLinear
from lora_cli.nn.variants import VARIANTS
from lora_cli.nn.vera import draw_pair
from lora_cli.spec import QUANTIZATIONS, AdaLoraSpec, LoraSpec, ModelSpec, TrainRun

from .models import FRESH, lm_logits, logits, tiny, tiny_lm, trained

CPU = torch.device("cpu")
NUM_IN, NUM_OUT = 48, 20
LARGEST_ERROR = {"nf4": 0.1, "int8": 0.01}
"""Of a matrix of normal numbers, relative to its length."""
each_storage = pytest.mark.parametrize("storage", STORAGES)
each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(NUM_IN, NUM_OUT, bias=bias).to(dtype)


def conv1d(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(3)
    layer = Conv1D(NUM_OUT, NUM_IN)
    nn.init.normal_(layer.bias)
    return layer.to(dtype)


BASES = [
    pytest.param(linear, True, id="Linear-bias"),
    pytest.param(linear, False, id="Linear-no bias"),
    pytest.param(conv1d, True, id="Conv1D"),
]


def options(variant: str) -> dict[str, Any]:
    """Of a layer of this variant; VeRA's are given an A and a B."""
    shared = draw_pair(4, NUM_OUT, NUM_IN, seed=0) if VARIANTS[variant].is_shared else None
    return {"r": 4, "alpha": 6.0, "variant": variant, "shared": shared}


def spec_of(variant: str, targets: list[str]) -> LoraSpec:
    """Of an adapter of rank 2."""
    ranks = AdaLoraSpec(target_r=2) if variant == "adalora" else AdaLoraSpec()
    return LoraSpec(r=2, variant=variant, targets=targets, adalora=ranks)


def adapted(base: nn.Module, storage: str, variant: str = "lora") -> LoraQuantizedLinear:
    layer = LoraQuantizedLinear(QuantizedLinear(base, storage), generator=generator_for(0, "layer"), **options(variant))
    layer.base_layer.requires_grad_(False)
    return layer


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 3, NUM_IN, generator=torch.Generator().manual_seed(0))


def test_the_names_in_the_spec_are_those_of_the_table() -> None:
    assert set(QUANTIZATIONS) == {"none", *STORAGES}


@each_storage
def test_what_is_left_is_near_the_weight(storage: str) -> None:
    base = linear()
    error = (QuantizedLinear(base, storage).weight - base.weight).norm() / base.weight.norm()
    assert error < LARGEST_ERROR[storage]


@pytest.mark.parametrize("shape", [(20, 48), (15, 64), (4, 16), (8, 40), (12, 192), (16, 80)])
def test_nf4_is_the_papers_table_times_the_size_of_each_block_of_64(shape: tuple[int, int]) -> None:
    torch.manual_seed(3)
    base = nn.Linear(shape[1], shape[0])
    layer = QuantizedLinear(base, "nf4")
    numbers = torch.stack([layer.packed.flatten() >> 4, layer.packed.flatten() & 15], 1).flatten().long()
    sizes = layer.absmax_code[layer.absmax.long()] * layer.absmax_absmax + layer.absmax_mean
    expected = layer.code[numbers].view(-1, 64) * sizes[:, None]
    torch.testing.assert_close(layer.weight, expected.view(shape))
    # Dettmers et al. 2023, appendix E: 16 numbers from -1 to 1, one of them 0, as far apart as normal quantiles.
    assert (layer.code[0], layer.code[7], layer.code[15]) == (-1, 0, 1)
    torch.testing.assert_close(sizes, base.weight.detach().view(-1, 64).abs().amax(1), rtol=0.02, atol=0)


def test_int8_is_a_whole_number_of_steps_of_each_row() -> None:
    base = linear()
    step = base.weight.detach().abs().amax(1, keepdim=True) / 127
    kept = QuantizedLinear(base, "int8").weight
    torch.testing.assert_close(kept, (base.weight / step).round() * step, rtol=1e-3, atol=float(step.max()))
    # Half a step, and what rounding to fp16 before does.
    assert (kept - base.weight).abs().max() <= (0.5 + 127 * 2**-11) * step.max()


@pytest.mark.parametrize(("storage", "share"), [("nf4", 0.14), ("int8", 0.26)])
def test_a_layer_of_minilm_takes_a_fraction_of_its_bytes(storage: str, share: float) -> None:
    size = quantized_size(nn.Sequential(QuantizedLinear(nn.Linear(384, 384), storage)))
    assert size is not None
    assert size.fp32_bytes == 4 * 384 * 384
    assert size.bytes / size.fp32_bytes < share


@each_storage
@pytest.mark.parametrize(("base", "bias"), BASES)
def test_a_quantised_layer_computes_with_the_dequantised_weight(base, bias, storage, x) -> None:
    layer = QuantizedLinear(base(bias), storage)
    x.requires_grad_()
    out = layer(x)
    torch.testing.assert_close(out, functional.linear(x, layer.matrix, layer.bias))
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(gradient, 2 * out.detach() @ layer.matrix)
    assert layer.weight.shape == base(bias).weight.shape


@each_storage
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_in_half_precision_stay_in_it(storage: str, dtype: torch.dtype, x: torch.Tensor) -> None:
    layer = QuantizedLinear(linear(dtype=dtype), storage)
    assert layer.weight.dtype == layer(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(layer(x.to(dtype)).float(), linear()(x), rtol=0, atol=0.3)


@each_storage
def test_autocast_decides_in_what_it_computes(storage: str, x: torch.Tensor) -> None:
    layer = QuantizedLinear(linear(), storage)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), rtol=0.02, atol=0.02)
    (gradient,) = torch.autograd.grad(out.float().sum(), x)
    assert gradient.dtype == torch.float32


def test_no_dense_weight_and_no_input_is_kept_for_the_backward_pass(x: torch.Tensor) -> None:
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        QuantizedLinear(linear(), "nf4")(x.requires_grad_())
    assert kept == []


@each_storage
@each_variant
@pytest.mark.parametrize(("base", "bias"), BASES)
def test_a_fresh_adapter_changes_nothing(base, bias, variant, storage, x) -> None:
    layer = adapted(base(bias), storage, variant)
    torch.testing.assert_close(layer(x), layer.base_layer(x))


@each_storage
@each_variant
@pytest.mark.parametrize(("base", "bias"), BASES)
def test_merged_computes_what_adapted_did_and_unmerging_restores_every_bit(base, bias, variant, storage, x) -> None:
    layer = trained(adapted(base(bias), storage, variant))
    before, quantized = layer(x), layer.base_layer
    kept = copy.deepcopy(quantized.state_dict())
    change = layer.merge()
    assert change > 0
    assert type(layer.base_layer) is type(base(bias)), "a plain layer"
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.base_layer(x), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight, layer.base_layer.weight)
    with pytest.raises(AdapterError, match="merged already"):
        layer.merge()
    layer.unmerge()
    assert layer.base_layer is quantized
    assert all(torch.equal(tensor, kept[name]) for name, tensor in quantized.state_dict().items())
    assert torch.equal(layer(x), before)
    with pytest.raises(AdapterError, match="not merged"):
        layer.unmerge()


def test_a_merged_weight_that_is_not_finite_is_refused(x: torch.Tensor) -> None:
    layer = trained(adapted(linear(), "nf4"))
    with torch.no_grad():
        layer.B[0, 0] = torch.inf
    with pytest.raises(AdapterError, match="not finite"):
        layer.merge()
    assert not layer.is_merged


@each_storage
@each_variant
def test_gradients_are_those_of_the_dequantised_weight(variant: str, storage: str, x: torch.Tensor) -> None:
    layer = trained(adapted(linear(), storage, variant))
    dense = linear()
    with torch.no_grad():
        dense.weight.copy_(layer.matrix)
    kind = kind_of(dense)
    assert kind is not None
    twin = kind(dense, **options(variant))
    twin.load_state_dict({name: p for name, p in layer.named_parameters() if "base" not in name}, strict=False)
    wanted = dict(twin.named_parameters())
    for out in (layer(x), twin(x)):
        out.square().sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-5, atol=1e-5)


def quantized(model: nn.Module, storage: str = "nf4", skip: tuple[str, ...] = ("classifier",)) -> nn.Module:
    quantize(model, storage, skip=skip, device=CPU)
    return model


def test_all_linear_layers_are_replaced_but_the_head_and_what_is_tied() -> None:
    model = tiny("bert")
    shared = model.bert.encoder.layer[0].attention.self
    shared.key.weight = shared.query.weight
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    left = {"classifier"} | {f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key")}
    quantized(model)
    assert {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} == left
    assert {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)} == names - left


def test_a_layer_under_several_names_stays_one() -> None:
    shared = nn.Linear(8, 8)
    model = quantized(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2]
    assert len(quantized_layers(model)) == 1


@each_storage
@pytest.mark.parametrize("family", ["albert", "deberta", "deberta-v2", "distilbert", "modernbert"])
def test_every_family_computes_with_quantised_layers_also_where_it_reads_their_weights(family, storage) -> None:
    model = quantized(tiny(family), storage, FRESH.get(family, ("head", "classifier")))
    found = logits(model)
    dequantize(model)
    assert not quantized_layers(model)
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "opt"])
def test_models_that_write_too(family: str) -> None:
    model = quantized(tiny_lm(family), skip=("lm_head",))
    found = lm_logits(model)
    dequantize(model)
    torch.testing.assert_close(found, lm_logits(model), rtol=1e-5, atol=1e-5)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.quantization=nf4: this model has no linear layers"):
        quantize(nn.Sequential(nn.Embedding(3, 4)), "nf4", skip=(), device=CPU)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"model.quantization: needs a package: pip install 'lora-cli\[quant\]'"):
        QuantizedLinear(linear(), "nf4")


ALL = LoraSpec(r=2, targets=["all-linear"])


def test_merging_a_dylora_after_a_step_merges_every_rank() -> None:
    model = quantized(tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    inject(model, LoraSpec(variant="dylora", r=6, targets=["all-linear"]), groups={}, fresh=["classifier"])
    before = logits(trained(model).eval())
    torch.manual_seed(1)
    assert not torch.allclose(logits(model.train()), before), "a rank is drawn"
    merge(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


@each_variant
def test_a_model_is_adapted_merged_and_restored(variant: str) -> None:
    model = quantized(tiny("bert"))
    base = logits(model)
    injection = inject(model, spec_of(variant, ["all-linear"]), groups={}, fresh=["classifier"])
    torch.testing.assert_close(logits(model), base)
    assert injection.num_total > sum(p.numel() for p in model.parameters()), "quantised weights count as what they were"
    trained(model)
    before = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert torch.equal(logits(model), before)
    with pytest.raises(AdapterError, match="merge the adapter first"):
        dequantize(model)
    merge(model)
    remove(model)
    dequantize(model)
    assert not quantized_layers(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_shapes_are_known_without_dequantising(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(tiny("bert"))
    name = "bert.encoder.layer.0.intermediate.dense"
    assert tuple(matrix_of(model, name).shape) == (24, 16)
    monkeypatch.setattr(QuantizedLinear, "matrix", None)
    assert shape_of(model, name) == (24, 16)
    inject(model, ALL, groups={}, fresh=["classifier"])
    assert shape_of(model, name) == (24, 16)


def saved(model: nn.Module, folder: Path, spec: LoraSpec = ALL, *, prints: str | None = None) -> Path:
    """An adapter trained on `model`."""
    injection = inject(model, spec, groups={}, fresh=["classifier"])
    trained(model)
    facts = {"base_name": None, "revision": None, "task_type": "SEQ_CLS", "fingerprint": prints, "extra": {}}
    save_adapter(model, injection, folder, **facts)
    return folder


def test_an_adapter_is_saved_and_loaded_on_the_quantised_base_and_on_the_plain_one(tmp_path: Path) -> None:
    prints = fingerprint(tiny("bert"), fresh=["classifier"])
    model = quantized(tiny("bert"))
    folder = saved(model, tmp_path / "adapter", prints=prints)
    same, plain = quantized(tiny("bert")), tiny("bert")
    for other in (same, plain):
        load_adapter(other, folder, fresh=["classifier"], fingerprint=prints)
    assert torch.equal(logits(same), logits(model))
    assert not torch.equal(logits(plain), logits(model))
    torch.testing.assert_close(logits(plain), logits(model), rtol=0.5, atol=0.5)


def test_parts_of_gpt2s_fused_projection_are_adapted_and_saved_as_peft_expects_a_conv1d(tmp_path: Path) -> None:
    model = quantized(tiny_lm("gpt2"), skip=("lm_head",))
    spec = LoraSpec(r=2, targets=["c_attn:q+v"])
    injection = inject(model, spec, groups={})
    trained(model)
    save_adapter(
        model, injection, tmp_path / "a", base_name=None, revision=None, task_type=None, fingerprint=None, extra={}
    )
    assert '"fan_in_fan_out": true' in (tmp_path / "a" / "adapter_config.json").read_text()
    other = quantized(tiny_lm("gpt2"), skip=("lm_head",))
    load_adapter(other, tmp_path / "a", fresh=(), fingerprint=None)
    assert torch.equal(lm_logits(other), lm_logits(model))
    before = lm_logits(model)
    merge(model)
    torch.testing.assert_close(lm_logits(model), before, rtol=1e-5, atol=1e-5)


@each_variant
def test_peft_computes_the_same_over_bitsandbytes_own_layers(variant: str, tmp_path: Path) -> None:
    import bitsandbytes
    from peft import PeftModel

    # Rows that are not whole blocks its own layers decode wrongly on processors with AVX-512.
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    model = quantized(tiny("bert", **sizes))
    folder = saved(model, tmp_path / "adapter", spec_of(variant, ["query", "value", "dense"]))
    theirs = tiny("bert", **sizes)
    for name, module in list(theirs.named_modules()):
        if isinstance(module, nn.Linear) and name != "classifier":
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, compute_dtype=torch.float32, quant_type="nf4"
            )
            # With AVX-512 it would pack the weight anew when scoring, and compute in bf16.
            layer.support_avx512bf16_for_cpu = False
            layer.load_state_dict(module.state_dict())
            theirs.set_submodule(name, layer.to("cpu"))
    theirs.is_loaded_in_4bit = True
    found = logits(PeftModel.from_pretrained(theirs, str(folder)).eval())
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pooler", "bert.encoder.layer.0.output.dense"])
def test_a_quantised_module_cannot_train_whole(name: str) -> None:
    spec = LoraSpec(targets=["query"], modules_to_save=[name])
    with pytest.raises(ConfigError, match=r"is quantised \(model.quantization\), so it cannot train"):
        inject(quantized(tiny("bert")), spec, groups={}, fresh=["classifier"])


def test_full_fine_tuning_of_a_quantised_base_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.quantization=nf4: none where everything trains"):
        TrainRun(model=ModelSpec(name="x", quantization="nf4"), lora=LoraSpec(variant="full", targets=[]))


def test_biases_of_quantised_layers_can_train() -> None:
    model = quantized(tiny("bert"))
    inject(model, LoraSpec(r=2, targets=["query"], bias="all"), groups={}, fresh=["classifier"])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.bert.encoder.layer[0].intermediate.dense.bias.requires_grad


def test_a_quantised_weight_that_changes_while_training_is_noticed() -> None:
    model = quantized(tiny("bert"))
    inject(model, ALL, groups={}, fresh=["classifier"])
    watch = Movement(model)
    trained(model)
    watch.verify()
    quantized_layers(model)[3].absmax.add_(1)
    with pytest.raises(TrainingFailure, match="absmax is frozen but changed"):
        watch.verify()


def test_memory_counts_what_is_kept_and_disk_what_was_loaded() -> None:
    plain, small = tiny("bert"), quantized(tiny("bert"))
    for model in (plain, small):
        inject(model, ALL, groups={}, fresh=["classifier"])
    before, after = footprint(plain), footprint(small)
    assert after.total_parameters == before.total_parameters
    assert after.base_bytes == before.base_bytes
    size = quantized_size(small)
    assert size is not None
    assert before.weight_bytes - after.weight_bytes == size.fp32_bytes - size.bytes


class TestLoftq:
    """The init that knows what quantising took away."""

    @each_storage
    @pytest.mark.parametrize("r", [1, 4, min(NUM_IN, NUM_OUT)])
    def test_a_and_b_are_the_best_approximation_of_what_quantising_took_away(self, storage: str, r: int) -> None:
        weight = linear().weight.detach()
        quantized = QuantizedLinear(linear(), storage, original=weight)
        layer = LoraQuantizedLinear(quantized, r=r, alpha=1.5 * r, init="loftq")
        rest = weight - layer.matrix - layer.delta_matrix()
        # Eckart and Young 1936: no other matrix of this rank leaves less.
        values = torch.linalg.svdvals(weight - layer.matrix)
        torch.testing.assert_close(rest.norm(), values[r:].norm(), rtol=1e-4, atol=1e-5)

    @each_storage
    @pytest.mark.parametrize("variant", ["lora", "dora", "lora_fa"])
    def test_outputs_are_nearer_to_those_of_the_model_that_was_quantised(
        self, storage: str, variant: str, x: torch.Tensor
    ) -> None:
        quantized = QuantizedLinear(linear(), storage, original=linear().weight.detach())
        layer = LoraQuantizedLinear(quantized, r=4, alpha=6.0, init="loftq", variant=variant)
        assert (layer(x) - linear()(x)).norm() < 0.9 * (quantized(x) - linear()(x)).norm()

    @each_storage
    def test_a_model_starts_nearer_and_lets_the_weights_go(self, storage: str) -> None:
        model, plain = tiny_lm("llama"), lm_logits(tiny_lm("llama"))
        quantize(model, storage, skip=["lm_head"], device=torch.device("cpu"), keep_original=True)
        without = lm_logits(model)
        size = quantized_size(model)
        inject(model, LoraSpec(init="loftq", r=8, targets=["all-linear"]), groups={}, skip=["lm_head"])
        assert (lm_logits(model) - plain).norm() < 0.7 * (without - plain).norm()
        assert all(layer.original is None for layer in quantized_layers(model))
        assert quantized_size(model) == size

    def test_a_layer_that_was_not_quantised_is_refused_by_name(self) -> None:
        says = r"lora.init=loftq: only for layers that model.quantization has just quantised, not \S+q_proj"
        with pytest.raises(ConfigError, match=says):
            inject(tiny_lm("llama"), LoraSpec(init="loftq", targets=["q_proj"]), groups={})

    def test_a_run_without_quantization_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"lora.init=loftq: needs model.quantization=nf4 or int8"):
            TrainRun(lora=LoraSpec(init="loftq"))

    @pytest.mark.parametrize("variant", ["vera", "dylora", "adalora", "full"])
    def test_a_variant_without_an_a_and_b_of_its_own_is_refused(self, variant: str) -> None:
        with pytest.raises(ConfigError, match=f"lora.init=loftq: kaiming with lora.variant={variant}"):
            LoraSpec(variant=variant, init="loftq", targets=[])
