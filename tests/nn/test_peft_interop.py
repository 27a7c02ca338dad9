"""Our adapters in PEFT and PEFT's in ours: equal logits, on tiny random models."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.errors import AdapterError
from lora_cli.nn.adapter import load_adapter, save_adapter
from lora_cli.nn.inject import adapted_layers, inject, merge
from lora_cli.spec import LoraSpec

from .models import FAMILIES, FRESH, LM_CONFIGS, QUERY_VALUE, lm_logits, logits, tiny, tiny_lm, trained

# PEFT asks the hub for the base's config when it saves; there is no hub in a test.
os.environ["HF_HUB_OFFLINE"] = "1"


def into_peft(base: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder)).eval()


def from_peft(base: nn.Module, folder: Path, **config: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "task_type": "SEQ_CLS", "init_lora_weights": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, on bias and on saving
        model = get_peft_model(base, LoraConfig(**(settings | config)))
        trained(model, 5).save_pretrained(folder)
    return model.eval()


def save(model: nn.Module, injection: Any, folder: Path, task_type: str | None = "SEQ_CLS") -> None:
    save_adapter(
        model, injection, folder, base_name="tiny", revision=None, task_type=task_type, fingerprint=None, extra={}
    )


def ours(family: str, folder: Path, *, task_type: str | None = "SEQ_CLS", **spec: Any) -> nn.Module:
    model = tiny(family)
    settings = {"r": 4, "alpha": 6.0, "targets": QUERY_VALUE[family]} | spec
    injection = inject(model, LoraSpec(**settings), groups={}, fresh=FRESH[family])
    save(trained(model), injection, folder, task_type)
    return model


def assert_same_logits(one: nn.Module, other: nn.Module) -> None:
    # In fp64, so that the bound shows the same formula, not the rounding of a deep fp32 model.
    torch.testing.assert_close(logits(one.double()), logits(other.double()), rtol=0, atol=1e-6)


SPECS: dict[str, dict[str, Any]] = {
    "query and value": {},
    "all-linear": {"targets": ["all-linear"]},
    "dora": {"variant": "dora"},
    "rslora": {"scaling": "alpha/sqrt(r)", "alpha": 2.5},
    "patterns": {"rank_pattern": {"re:.*\\.0\\..*": 2}, "alpha_pattern": {"re:.*\\.0\\..*": 3.0}},
    "all biases": {"bias": "all"},
    "their biases": {"bias": "lora_only", "dropout": 0.1},
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_what_we_did(family: str, spec: dict[str, Any], tmp_path: Path) -> None:
    model = ours(family, tmp_path / "adapter", **spec)
    assert_same_logits(into_peft(tiny(family), tmp_path / "adapter"), model)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_our_adapter_comes_back_bit_for_bit(family: str, spec: dict[str, Any], tmp_path: Path) -> None:
    model, other = ours(family, tmp_path / "adapter", **spec), tiny(family)
    load_adapter(other, tmp_path / "adapter", fresh=FRESH[family], fingerprint=None)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("targets", [["output.dense"], ["re:.*layer\\.0.*key"], [], ["key"]])
def test_peft_adapts_the_same_layers_whatever_we_targeted(targets: list[str], tmp_path: Path) -> None:
    model, other = ours("bert", tmp_path / "adapter", targets=targets), tiny("bert")
    load_adapter(other, tmp_path / "adapter", fresh=FRESH["bert"], fingerprint=None)
    assert list(adapted_layers(other)) == list(adapted_layers(model))
    assert_same_logits(into_peft(tiny("bert"), tmp_path / "adapter"), model)


def test_shortest_exact_names_are_written(tmp_path: Path) -> None:
    def written(**spec: Any) -> Any:
        ours("bert", tmp_path / "adapter", **spec)
        return json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_modules"]

    assert written() == ["query", "value"]
    assert written(targets=["all-linear"]) == ["dense", "key", "query", "value"]
    assert written(targets=["attention.output.dense"]) == ["attention.output.dense"]
    assert written(targets=["intermediate.dense", "layer.1.output.dense"]) == ["1.output.dense", "intermediate.dense"]


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_head_that_was_not_fresh_is_saved_for_peft(task_type: str | None, tmp_path: Path) -> None:
    model = tiny("distilbert")
    injection = inject(model, LoraSpec(targets=["q_lin"], r=2), groups={}, fresh=["classifier"])
    save(trained(model), injection, tmp_path / "adapter", task_type)
    other = tiny("distilbert")
    load_adapter(other, tmp_path / "adapter", fresh=["classifier"], fingerprint=None)
    assert torch.equal(logits(other), logits(model))
    assert_same_logits(into_peft(tiny("distilbert"), tmp_path / "adapter"), model)


def test_adapter_saved_while_merged_is_the_same(tmp_path: Path) -> None:
    model = tiny("bert")
    injection = inject(model, LoraSpec(targets=["all-linear"], r=2), groups={}, fresh=FRESH["bert"])
    save(trained(model), injection, tmp_path / "before")
    merge(model)
    save(model, injection, tmp_path / "after")
    for name in ("adapter_config.json", "adapter_model.safetensors", "lora.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layer.0.attention.self.query": 2}, "alpha_pattern": {"value": 16}},
    "all biases": {"bias": "all"},
    "their biases": {"bias": "lora_only"},
    "dropout": {"lora_dropout": 0.1},
    "exclude": {"target_modules": ["query", "dense"], "exclude_modules": ["attention.output.dense", "pooler.dense"]},
    "pooler saved": {"modules_to_save": ["pooler", "classifier"], "target_modules": ["dense"]},
    "norms saved": {"modules_to_save": ["LayerNorm"]},
    "no task": {"task_type": None, "modules_to_save": ["classifier"]},
}


@pytest.mark.parametrize("config", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
def test_we_compute_what_peft_did(config: dict[str, Any], tmp_path: Path) -> None:
    peft = from_peft(tiny("bert"), tmp_path, **({"target_modules": ["query", "value"]} | config))
    model = tiny("bert")
    load_adapter(model, tmp_path, fresh=["classifier"], fingerprint=None)
    assert_same_logits(model, peft)


@pytest.mark.parametrize("config", [{}, {"bias": "all"}, {"use_dora": True}], ids=["plain", "all biases", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_we_compute_what_peft_did_in_every_family(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    fresh = FRESH[family]
    targets = [name.rsplit(".", 1)[-1] for name in QUERY_VALUE[family]]
    peft = from_peft(tiny(family), tmp_path, target_modules=targets, modules_to_save=list(fresh), **config)
    model = tiny(family)
    load_adapter(model, tmp_path, fresh=fresh, fingerprint=None)
    assert_same_logits(model, peft)


def test_pooler_that_peft_left_random_is_missed_by_name(tmp_path: Path) -> None:
    from_peft(tiny("bert"), tmp_path, target_modules=["query"])
    with pytest.raises(AdapterError, match=r"2 tensors are missing: bert.pooler.dense.bias"):
        load_adapter(tiny("bert"), tmp_path, fresh=FRESH["bert"], fingerprint=None)


def test_names_of_older_versions_are_understood(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    peft = from_peft(tiny("bert"), tmp_path, target_modules=["query"], use_dora=True, bias="lora_only")
    path = tmp_path / "adapter_model.safetensors"
    renamed = {
        key.replace(".base_layer.bias", ".bias")
        .replace("lora_A.weight", "lora_A.default.weight")
        .replace("magnitude_vector", "magnitude_vector.weight")
        .replace("classifier.", "classifier.modules_to_save.default."): tensor
        for key, tensor in load_file(path).items()
    }
    renamed["base_model.model.classifier.original_module.weight"] = torch.zeros(3, 16)
    save_file(renamed, path)
    model = tiny("bert")
    load_adapter(model, tmp_path, fresh=["classifier"], fingerprint=None)
    assert_same_logits(model, peft)


def test_minimal_config_and_narrow_tensors_load(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from_peft(tiny("bert"), tmp_path, target_modules=["query"])
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["query"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path)
    model = tiny("bert")
    injection = load_adapter(model, tmp_path, fresh=["classifier"], fingerprint=None)
    assert injection.trained_whole == ("classifier",)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


LM_CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "conv1d": ("gpt2", ["c_attn", "c_fc"], {}),
    "conv1d, dora": ("gpt2", ["c_attn", "mlp.c_proj"], {"variant": "dora"}),
    "conv1d, biases": ("gpt2", ["c_attn"], {"bias": "all", "scaling": "alpha/sqrt(r)"}),
    "embedding": ("llama", ["embed_tokens"], {}),
    "embedding and output": ("llama", ["embed_tokens", "lm_head", "q_proj"], {"scaling": "alpha/sqrt(r)"}),
    "embedding, dora": ("opt", ["embed_tokens", "v_proj"], {"variant": "dora"}),
    "gpt2's embeddings": ("gpt2", ["wte", "wpe"], {"variant": "dora"}),
    "scaled embedding": ("gemma", ["embed_tokens"], {}),
    "scaled embedding, dora": ("gemma3_text", ["embed_tokens", "o_proj"], {"variant": "dora"}),
    "encoder-decoder": ("t5", ["q", "v", "wo"], {}),
    "two stacks": ("bart", ["fc1", "q_proj"], {"bias": "lora_only"}),
    "relative positions": ("t5", ["relative_attention_bias"], {"r": 2}),
    "falcon": ("falcon", ["query_key_value"], {}),
    "beside experts": ("mixtral", ["q_proj", "v_proj"], {}),
}


def untied(family: str) -> nn.Module:
    return tiny_lm(family, tie_word_embeddings=False)


def assert_same_lm_logits(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(lm_logits(one.double()), lm_logits(other.double()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", LM_CASES)
def test_generation_adapters_are_the_same_in_peft_and_come_back(case: str, tmp_path: Path) -> None:
    family, targets, spec = LM_CASES[case]
    model, again = untied(family), untied(family)
    injection = inject(model, LoraSpec(**({"r": 3, "alpha": 4.5, "targets": targets} | spec)), groups={})
    save(trained(model), injection, tmp_path / "adapter", "CAUSAL_LM")
    load_adapter(again, tmp_path / "adapter", fresh=[], fingerprint=None)
    assert torch.equal(lm_logits(again), lm_logits(model))
    assert_same_lm_logits(into_peft(untied(family), tmp_path / "adapter"), model)


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("case", LM_CASES)
def test_we_compute_what_pefts_generation_adapters_do(case: str, tmp_path: Path) -> None:
    family, targets, spec = LM_CASES[case]
    config = {"use_dora": spec.get("variant") == "dora", "use_rslora": "scaling" in spec, "r": spec.get("r", 3)}
    peft = from_peft(
        untied(family), tmp_path, target_modules=targets, task_type=None, bias=spec.get("bias", "none"), **config
    )
    model = untied(family)
    injection = load_adapter(model, tmp_path, fresh=[], fingerprint=None)
    assert {name.rpartition(".")[2] for row in injection.rows for name in row.modules} == {
        target.rpartition(".")[2] for target in targets
    }
    assert_same_lm_logits(model, peft)


@pytest.mark.parametrize("family", LM_CONFIGS)
def test_peft_adapts_all_linear_layers_as_we_do(family: str, tmp_path: Path) -> None:
    model = tiny_lm(family)
    injection = inject(model, LoraSpec(r=2, alpha=3.0, targets=["all-linear"]), groups={}, skip=["lm_head"])
    save(trained(model), injection, tmp_path / "adapter", None)
    assert_same_lm_logits(into_peft(tiny_lm(family), tmp_path / "adapter"), model)


def test_adapter_of_a_tied_embedding_is_refused_by_name(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, on the tie
        from_peft(tiny_lm("gpt2"), tmp_path, target_modules=["wte"], task_type=None)
    with pytest.raises(AdapterError, match=r"transformer.wte: shares its weight with 'lm_head'"):
        load_adapter(tiny_lm("gpt2"), tmp_path, fresh=[], fingerprint=None)


def test_all_linear_as_a_word_leaves_out_the_output_embedding(tmp_path: Path) -> None:
    from_peft(tiny_lm("llama"), tmp_path, target_modules="all-linear", task_type=None)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": "all-linear"}))
    model = tiny_lm("llama")
    load_adapter(model, tmp_path, fresh=[], fingerprint=None)
    assert len(adapted_layers(model)) == 2 * 7
