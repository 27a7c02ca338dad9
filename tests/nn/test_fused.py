"""Parts of fused projections: the layouts are the models', and such an adapter is at home in PEFT."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.errors import AdapterError, ConfigError, UnknownName
from lora_cli.nn.adapter import load_adapter, read_adapter, save_adapter
from lora_cli.nn.fused import LAYOUTS, placement_of
from lora_cli.nn.inject import Injection, adapted_layers, inject, merge
from lora_cli.nn.kinds import matrix_of
from lora_cli.spec import LoraSpec

from .models import lm_logits, logits, tiny, tiny_lm, trained

MODELS: dict[str, Callable[..., nn.Module]] = {
    "gpt2": lambda **settings: tiny_lm("gpt2", **settings),
    "bloom": lambda **settings: tiny_lm("bloom", **settings),
    "gpt_neox": lambda **settings: tiny_lm("gpt_neox", **settings),
    "falcon": lambda **settings: tiny_lm("falcon", **settings),
    "phi3": lambda **settings: tiny_lm("phi3", **settings),
    "deberta": lambda **settings: tiny("deberta", **settings),
    "modernbert": lambda **settings: tiny("modernbert", **settings),
}
FUSED = {family: next(iter(ends)) for family, ends in LAYOUTS.items()}
FRESH = {"deberta": ["pooler.dense", "classifier"], "modernbert": ["head", "classifier"]}
LEAVES = {family: end.rpartition(".")[2] for family, end in FUSED.items()}


def output(model: nn.Module) -> torch.Tensor:
    return logits(model) if hasattr(model, "classifier") else lm_logits(model)


def adapt(family: str, target: str = "q+v", **spec: Any) -> tuple[nn.Module, Injection]:
    model = MODELS[family]()
    settings = {"r": 2, "alpha": 6.0, "targets": [f"{LEAVES[family]}:{target}"]} | spec
    injection = inject(model, LoraSpec(**settings), groups={}, fresh=FRESH.get(family, []))
    return trained(model), injection


def save(model: nn.Module, injection: Injection, folder: Path) -> None:
    save_adapter(model, injection, folder, base_name="tiny", revision=None, task_type=None, fingerprint=None, extra={})


def first_fused(model: nn.Module, end: str) -> str:
    return next(name for name, _ in model.named_modules() if name.endswith(f".{end}"))


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("family", MODELS)
def test_parts_are_what_the_model_takes_them_for(family: str, part: str) -> None:
    model = MODELS[family](attn_implementation="eager", output_attentions=True)
    name = first_fused(model, FUSED[family])
    rows = placement_of(model, name, [part], matrix_of(model, name).shape[0]).rows
    ids = torch.tensor([[2, 5, 9, 11, 30, 3]])

    def first_attention() -> torch.Tensor:
        with torch.no_grad():
            return model(ids).attentions[0].sum(1)[0]

    def disturb(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[:, 2, rows] += 1 + torch.rand(len(rows), generator=torch.Generator().manual_seed(0))
        return out

    weights, before = first_attention(), model(ids).logits
    model.get_submodule(name).register_forward_hook(disturb)
    changed = (first_attention() - weights).abs().amax(-1) > 1e-5
    # A query matters to its own position, a key to all that look at it, a value to no weight at all.
    expected = {"q": [2], "k": [2, 3, 4, 5], "v": []}[part]
    assert [position for position in changed.nonzero().flatten().tolist() if position >= 2] == expected
    assert not torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(("family", "end", "part"), [("phi3", "gate_up_proj", "up"), ("modernbert", "Wi", "gate")])
def test_only_the_linear_half_of_a_gated_projection_turns_its_output_round(family: str, end: str, part: str) -> None:
    model = MODELS[family]()
    name = first_fused(model, end)
    mlp, fused = model.get_submodule(name.rpartition(".")[0]), model.get_submodule(name)
    x = torch.randn(3, fused.in_features)
    before = mlp(x)
    for other in ("gate", "up", "input"):
        if other not in LAYOUTS[family][f"mlp.{end}"](model.config, fused.out_features):
            continue
        rows = placement_of(model, name, [other], fused.out_features).rows
        flipped = copy.deepcopy(mlp)
        flipped.get_submodule(end).weight.data[rows] *= -1
        assert torch.allclose(flipped(x), -before, atol=1e-5) == (other == part)


@pytest.mark.parametrize("family", MODELS)
def test_merged_model_computes_what_the_adapted_one_did(family: str) -> None:
    plain = output(MODELS[family]())
    model, _ = adapt(family)
    expected = output(model)
    assert not torch.allclose(expected, plain, atol=1e-3)
    merge(model)
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-4)


SPECS: dict[str, dict[str, Any]] = {
    "one of rank 3": {"target": "v", "r": 3},
    "two": {},
    "two, rslora": {"scaling": "alpha/sqrt(r)", "alpha": 2.5},
    "three, biases": {"target": "q+k+v", "bias": "lora_only", "dropout": 0.1},
    "ranks of their own": {"rank_pattern": {"re:.*\\.0\\..*": 1}, "alpha_pattern": {"re:.*\\.0\\..*": 3.0}},
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("family", MODELS)
def test_peft_computes_what_we_did_and_we_get_the_parts_back(family: str, spec: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel

    model, injection = adapt(family, **spec)
    save(model, injection, tmp_path / "adapter")
    again = MODELS[family]()
    load_adapter(again, tmp_path / "adapter", fresh=FRESH.get(family, []), fingerprint=None)
    assert torch.equal(output(again), output(model))
    for ours, theirs in zip(adapted_layers(model).values(), adapted_layers(again).values(), strict=True):
        assert (ours.parts, ours.r, ours.alpha, ours.scaling) == (theirs.parts, theirs.r, theirs.alpha, theirs.scaling)
        assert torch.equal(ours.B, theirs.B)
    peft = PeftModel.from_pretrained(MODELS[family](), str(tmp_path / "adapter")).eval()
    # In fp64, so that the bound shows the same formula, not the rounding of a deep fp32 model.
    torch.testing.assert_close(output(peft.double()), output(model.double()), rtol=0, atol=1e-6)


def test_parts_and_whole_layers_share_one_adapter(tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny_lm("gpt2", tie_word_embeddings=False)
    targets = ["c_attn:q+v", "mlp.c_proj", "wte", "lm_head"]
    injection = inject(model, LoraSpec(r=2, alpha=3.0, targets=targets), groups={})
    save(trained(model), injection, tmp_path / "adapter")
    assert {row.pattern: row.ranks for row in injection.rows} == {
        "wte": (2,), "c_attn:q+v": (2, 2), "mlp.c_proj": (2, 2), "lm_head": (2,)
    }  # fmt: skip
    again = tiny_lm("gpt2", tie_word_embeddings=False)
    load_adapter(again, tmp_path / "adapter", fresh=[], fingerprint=None)
    assert torch.equal(lm_logits(again), lm_logits(model))
    with pytest.warns(UserWarning, match="fan_in_fan_out"):  # PEFT's, on Conv1D and Linear in one adapter
        peft = PeftModel.from_pretrained(tiny_lm("gpt2", tie_word_embeddings=False), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(lm_logits(peft.double()), lm_logits(model.double()), rtol=0, atol=1e-6)


def test_gpt2_medium_has_the_papers_number_of_parameters() -> None:
    from transformers import AutoModelForCausalLM, GPT2Config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    injection = inject(model, LoraSpec(r=4, alpha=32.0, targets=["c_attn:q+v"]), groups={})
    assert injection.num_trainable == injection.num_adapter == 393_216
    assert {layer.parts for layer in adapted_layers(model).values()} == {("q", "v")}


def test_file_says_what_it_is_and_has_one_rank_for_all(tmp_path: Path) -> None:
    save(*adapt("gpt2"), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    facts = json.loads((tmp_path / "adapter/lora.json").read_text())["parts"]
    assert {key: config.get(key) for key in ("r", "lora_alpha", "target_modules", "rank_pattern")} == {
        "r": 4, "lora_alpha": 12, "target_modules": ["c_attn"], "rank_pattern": None
    }  # fmt: skip
    assert "zero elsewhere" in facts["note"]
    assert facts["layers"]["transformer.h.1.attn.c_attn"] == {"names": ["q", "v"], "r": 2, "alpha": 6.0}
    assert read_adapter(tmp_path / "adapter").parts["transformer.h.0.attn.c_attn"].parts == ("q", "v")


def test_same_file_without_our_facts_is_a_plain_adapter(tmp_path: Path) -> None:
    model, injection = adapt("gpt2")
    save(model, injection, tmp_path / "adapter")
    (tmp_path / "adapter/lora.json").unlink()
    again = MODELS["gpt2"]()
    load_adapter(again, tmp_path / "adapter", fresh=[], fingerprint=None)
    assert {(layer.parts, layer.r) for layer in adapted_layers(again).values()} == {((), 4)}
    torch.testing.assert_close(lm_logits(again.double()), lm_logits(model.double()), rtol=0, atol=1e-6)


def test_order_of_parts_in_the_entry_does_not_matter() -> None:
    (one, _), (other, _) = adapt("gpt2", "q+v"), adapt("gpt2", "v+q")
    assert torch.equal(lm_logits(one), lm_logits(other))


REFUSED: dict[str, tuple[str, dict[str, Any], type[ConfigError], str]] = {
    "unknown part": ("gpt2", {"targets": ["c_attn:q+w"]}, UnknownName, "no such part 'w'. There are: k, q, v"),
    "no part": ("gpt2", {"targets": ["c_attn:"]}, UnknownName, "no such part ''"),
    "twice": ("gpt2", {"targets": ["c_attn:q+q"]}, ConfigError, "each part once"),
    "not fused": ("gpt2", {"targets": ["c_fc:q"]}, ConfigError, "projections with parts here: attn.c_attn"),
    "never fused": ("opt", {"targets": ["q_proj:q"]}, ConfigError, "projections with parts here: none"),
    "two entries": ("gpt2", {"targets": ["c_attn:q", "c_attn:v"]}, ConfigError, "name them in one entry"),
    "part and whole": ("gpt2", {"targets": ["c_attn:q", "all-linear"]}, ConfigError, "takes other parts of"),
    "dora": ("gpt2", {"targets": ["c_attn:q"], "variant": "dora"}, ConfigError, "lora.variant=dora: not for parts"),
    "rank": ("phi3", {"targets": ["qkv_proj:q+v"], "r": 9}, ConfigError, "lora.r=9: at most 8"),
    "scaling": ("gpt2", {"targets": ["c_attn:q+v"], "alpha": 6e3}, ConfigError, "at most 5000 for 2 parts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_part_that_cannot_be_adapted_is_refused_in_one_line(case: str) -> None:
    family, spec, kind, text = REFUSED[case]
    model = tiny_lm(family)
    with pytest.raises(kind) as error:
        inject(model, LoraSpec(**({"r": 2} | spec)), groups={})
    assert text in str(error.value)
    assert len(str(error.value)) <= 300
    assert not adapted_layers(model)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [({"multi_query": True}, "multi"), ({"new_decoder_architecture": True, "num_kv_heads": 1}, "grouped")],
)
def test_parts_of_a_falcon_that_shares_keys_are_refused_by_name(settings: dict[str, Any], kind: str) -> None:
    with pytest.raises(ConfigError, match=f"this Falcon has {kind}-query attention"):
        inject(tiny_lm("falcon", **settings), LoraSpec(targets=["query_key_value:q"]), groups={})
    inject(tiny_lm("falcon", **settings), LoraSpec(targets=["query_key_value"]), groups={})


def test_group_that_takes_two_shares_of_one_layer_is_refused() -> None:
    groups = {"default": ["c_attn:q", "c_attn:v"]}
    with pytest.raises(ConfigError, match=r"lora.targets=default: 'c_attn:v' takes other parts of"):
        inject(tiny_lm("gpt2"), LoraSpec(r=2), groups=groups)


def test_layer_of_another_width_than_its_name_says_is_refused() -> None:
    model = tiny_lm("gpt2", add_cross_attention=True)
    with pytest.raises(ConfigError, match=r"crossattention.c_attn:q\+v: it is not known to be fused"):
        inject(model, LoraSpec(targets=["c_attn:q+v"], r=2), groups={})


FACTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no object": (lambda f: f.update(parts=[]), "parts must be an object"),
    "no layers": (lambda f: f.update(parts={}), "parts must be an object"),
    "unknown layer": (
        lambda f: f["parts"]["layers"].update(x={"names": ["q"], "r": 2, "alpha": 1.0}),
        "parts of x need",
    ),
    "no names": (lambda f: layer(f).update(names=[]), "must be names, r and alpha"),
    "names": (lambda f: layer(f).update(names=[1]), "must be names, r and alpha"),
    "true": (lambda f: layer(f).update(r=True), "must be names, r and alpha"),
    "rank": (lambda f: layer(f).update(r=3), "need r=6"),
    "alpha": (lambda f: layer(f).update(alpha=5.0), "alpha=10 in"),
    "negative": (lambda f: layer(f).update(r=-2), "need r=-4"),
    "unknown part": (lambda f: layer(f).update(names=["q", "x"]), "no such part 'x'"),
    "other parts": (lambda f: layer(f).update(names=["q", "k"]), "c_attn.B is not zero outside of its parts"),
}


def layer(facts: dict[str, Any]) -> dict[str, Any]:
    return facts["parts"]["layers"]["transformer.h.0.attn.c_attn"]


@pytest.mark.parametrize("case", FACTS)
def test_facts_that_do_not_fit_the_tensors_are_refused(case: str, tmp_path: Path) -> None:
    change, text = FACTS[case]
    save(*adapt("gpt2"), tmp_path / "adapter")
    path = tmp_path / "adapter/lora.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))
    model = MODELS["gpt2"]()
    with pytest.raises(AdapterError) as error:
        load_adapter(model, tmp_path / "adapter", fresh=[], fingerprint=None)
    assert text in str(error.value)
    assert len(str(error.value)) <= 300
    assert not adapted_layers(model)
