from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_cli.errors import AdapterError, ConfigError, UnknownName, UserError
from lora_cli.nn.inject import (
    Injection,
    adapted_layers,
    inject,
    load_trainable_state,
    merge,
    parameter_groups,
    remove,
    trainable_state,
    unmerge,
)
from lora_cli.spec import LoraSpec

from .models import FAMILIES, FRESH, LM_CONFIGS, QUERY_VALUE, lm_logits, logits, tiny, tiny_lm, trained

GROUPS = {
    "default": ["query", "value"],
    "attention": ["query", "key", "value", "attention.output.dense"],
    "mlp": ["intermediate.dense", "output.dense"],
}
BERT_LAYERS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
BERT_LAYERS += ("intermediate.dense", "output.dense")


def adapt(model: nn.Module, *, fresh: tuple[str, ...] = ("classifier",), seed: int = 0, **spec: Any) -> Injection:
    settings = {"r": 2, "alpha": 4.0, "targets": ["query", "value"]} | spec
    return inject(model, LoraSpec(**settings), groups=GROUPS, fresh=fresh, seed=seed)


@pytest.fixture
def bert() -> nn.Module:
    return tiny("bert")


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("family", [*FAMILIES, "deberta"])
def test_injection_changes_no_output_and_merge_no_output_either(family: str, variant: str) -> None:
    model = tiny(family)
    before = logits(model)
    inject(
        model,
        LoraSpec(targets=["all-linear"], r=2, variant=variant),
        groups={},
        fresh=FRESH[family],
    )
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    trained(model)
    after = logits(model)
    assert not torch.allclose(after, before)
    merge(model)
    torch.testing.assert_close(logits(model), after, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert torch.equal(logits(model), after)


def test_only_adapters_and_fresh_modules_train(bert: nn.Module) -> None:
    injection = adapt(bert, fresh=("bert.pooler.dense", "classifier"))
    names = {name for name, p in bert.named_parameters() if p.requires_grad}
    factors = {
        f"bert.encoder.layer.{i}.attention.self.{m}.{f}" for i in (0, 1) for m in ("query", "value") for f in "AB"
    }
    heads = {f"{head}.{p}" for head in ("bert.pooler.dense", "classifier") for p in ("weight", "bias")}
    assert names == factors | heads
    assert injection.trained_whole == ("bert.pooler.dense", "classifier")


def test_injection_counts_what_the_model_holds(bert: nn.Module) -> None:
    injection = adapt(bert, targets=["query", "value"], rank_pattern={"layer.1.attention.self.value": 3})
    assert [(row.pattern, row.ranks) for row in injection.rows] == [("query", (2, 2)), ("value", (2, 3))]
    assert [row.num_parameters for row in injection.rows] == [2 * 2 * 32, 2 * 32 + 3 * 32]
    assert injection.num_adapter == sum(row.num_parameters for row in injection.rows)
    assert injection.num_trainable == injection.num_adapter + 3 * 16 + 3
    assert injection.num_total == sum(p.numel() for p in bert.parameters())


@pytest.mark.parametrize("family", [*FAMILIES, "deberta"])
def test_query_and_value_are_found_in_every_family(family: str) -> None:
    model = tiny(family)
    injection = inject(model, LoraSpec(targets=QUERY_VALUE[family]), groups={}, fresh=FRESH[family])
    assert len(injection.rows) == len(QUERY_VALUE[family])


@pytest.mark.parametrize(
    ("targets", "leaves"),
    [
        (["default"], BERT_LAYERS[0:3:2]),
        (["all-linear"], BERT_LAYERS),
        (["attention"], BERT_LAYERS[:4]),
        (["attention.output.dense"], BERT_LAYERS[3:4]),
        (["output.dense"], (BERT_LAYERS[3], BERT_LAYERS[5])),
        (["re:.*attention\\.self\\.(query|key)"], BERT_LAYERS[:2]),
        (["query", "default", "re:.*key"], BERT_LAYERS[:3]),
    ],
)
def test_targets_choose_layers(bert: nn.Module, targets: list[str], leaves: tuple[str, ...]) -> None:
    adapt(bert, targets=targets, fresh=("bert.pooler.dense", "classifier"))
    assert set(adapted_layers(bert)) == {f"bert.encoder.layer.{i}.{leaf}" for i in (0, 1) for leaf in leaves}


def test_full_name_chooses_one_layer(bert: nn.Module) -> None:
    adapt(bert, targets=["bert.encoder.layer.1.intermediate.dense"])
    assert list(adapted_layers(bert)) == ["bert.encoder.layer.1.intermediate.dense"]


def test_all_linear_leaves_out_distilberts_fresh_pre_classifier() -> None:
    model = tiny("distilbert")
    adapt(model, targets=["all-linear"], fresh=("pre_classifier", "classifier"))
    assert {name.split(".")[0] for name in adapted_layers(model)} == {"distilbert"}
    assert model.get_parameter("pre_classifier.weight").requires_grad


def test_all_linear_leaves_out_what_is_skipped_and_saved() -> None:
    model = tiny("bert")
    spec = LoraSpec(targets=["all-linear"], r=2, modules_to_save=["pooler"])
    inject(model, spec, groups={}, fresh=["classifier"], skip=["bert.encoder.layer.1"])
    assert {name.split(".")[3] for name in adapted_layers(model)} == {"0"}
    assert model.get_parameter("bert.pooler.dense.weight").requires_grad


def test_shared_module_gets_one_adapter() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

    model = Twice()
    injection = inject(model, LoraSpec(targets=["second"], r=2), groups={})
    assert model.first is model.second
    assert list(adapted_layers(model)) == ["first"]
    assert injection.num_adapter == 16
    remove(model)
    assert model.first is model.second
    assert type(model.first) is nn.Linear


def test_init_does_not_depend_on_order_or_on_other_targets(bert: nn.Module) -> None:
    other = tiny("bert")
    adapt(bert, targets=["query", "value"], seed=4)
    torch.manual_seed(99)
    adapt(other, targets=["value", "key", "query"], seed=4)
    name = "bert.encoder.layer.1.attention.self.value"
    assert torch.equal(adapted_layers(bert)[name].A, adapted_layers(other)[name].A)
    assert not torch.equal(adapted_layers(bert)[name].A, adapted_layers(bert)[name.replace("1", "0")].A)


def test_init_depends_on_the_seed(bert: nn.Module) -> None:
    other = tiny("bert")
    adapt(bert, seed=1)
    adapt(other, seed=2)
    assert not any(torch.equal(a.A, b.A) for a, b in zip(*map(_layers, (bert, other)), strict=True))


def _layers(model: nn.Module) -> list[Any]:
    return list(adapted_layers(model).values())


@pytest.mark.parametrize("kind", ["none", "lora_only", "all"])
def test_biases_train_as_asked(bert: nn.Module, kind: str) -> None:
    adapt(bert, bias=kind, targets=["query"])
    biases = {name for name, p in bert.named_parameters() if name.endswith("bias") and p.requires_grad}
    base = {f"bert.encoder.layer.{i}.attention.self.query.base_layer.bias" for i in (0, 1)}
    every = {name for name, _ in bert.named_parameters() if name.endswith("bias")}
    assert biases == {"none": {"classifier.bias"}, "lora_only": base | {"classifier.bias"}, "all": every}[kind]


def test_head_alone_trains_without_targets(bert: nn.Module) -> None:
    injection = adapt(bert, targets=[])
    assert injection.rows == ()
    assert injection.num_trainable == 3 * 16 + 3


def test_ranks_and_alphas_of_their_own_reach_their_layers(bert: nn.Module) -> None:
    adapt(bert, rank_pattern={"re:.*layer\\.0.*": 1}, alpha_pattern={"value": 8.0}, scaling="alpha/sqrt(r)")
    found = {
        name.removeprefix("bert.encoder.layer."): (m.r, m.alpha, m.scaling) for name, m in adapted_layers(bert).items()
    }
    assert found == {
        "0.attention.self.query": (1, 4.0, 4.0),
        "0.attention.self.value": (1, 8.0, 8.0),
        "1.attention.self.query": (2, 4.0, 4.0 / 2**0.5),
        "1.attention.self.value": (2, 8.0, 8.0 / 2**0.5),
    }


REFUSED = {
    "misspelt": ({"targets": ["qeury"]}, UnknownName, "Did you mean attention.self.query"),
    "unknown group": ({"targets": ["attn"]}, UnknownName, "all-linear"),
    "not linear": ({"targets": ["attention.self"]}, ConfigError, "BertSelfAttention"),
    "regex not linear": ({"targets": ["re:.*LayerNorm"]}, ConfigError, "LayerNorm"),
    "bad regex": ({"targets": ["re:("]}, ConfigError, "not a regular expression"),
    "empty": ({"targets": [""]}, UnknownName, "lora.targets"),
    "head": ({"targets": ["classifier"]}, ConfigError, "trains whole already"),
    "rank": ({"r": 17}, ConfigError, "lora.r=17: at most 16"),
    "own rank": ({"rank_pattern": {"value": 17}}, ConfigError, "lora.rank_pattern=17: at most 16"),
    "pattern": ({"rank_pattern": {"key": 1}}, UnknownName, "attention.self.query, attention.self.value"),
    "alpha pattern": ({"alpha_pattern": {"valu": 1.0}}, UnknownName, "Did you mean attention.self.value"),
    "overlap": ({"rank_pattern": {"value": 1, "self.value": 2}}, ConfigError, "both match"),
    "saved": ({"modules_to_save": ["poller"]}, UnknownName, "pooler"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_choice_is_refused_in_one_line_and_changes_nothing(bert: nn.Module, case: str) -> None:
    spec, kind, text = REFUSED[case]
    with pytest.raises(kind) as error:
        adapt(bert, **spec)
    assert text in str(error.value)
    assert len(str(error.value)) <= 300
    assert "\n" not in str(error.value)
    assert not adapted_layers(bert)
    assert all(p.requires_grad for p in bert.parameters())


def test_nothing_to_train_is_refused(bert: nn.Module) -> None:
    with pytest.raises(ConfigError, match="nothing would train"):
        adapt(bert, targets=[], fresh=())


def test_tied_weight_is_refused_by_name() -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=40)
    model = BertForMaskedLM(config)
    with pytest.raises(ConfigError, match=r"shares its weight with 'bert.embeddings.word_embeddings'"):
        adapt(model, targets=["decoder"], fresh=())
    with pytest.raises(ConfigError, match=r"shares its weight with 'cls.predictions.decoder'"):
        adapt(model, modules_to_save=["word_embeddings"], fresh=())
    inject(model, LoraSpec(targets=["all-linear"]), groups={}, skip=["cls.predictions.decoder"])
    assert "cls.predictions.decoder" not in adapted_layers(model)


@pytest.mark.parametrize(
    ("family", "target", "other"),
    [
        ("gpt2", "wte", "lm_head"),
        ("gpt2", "lm_head", "transformer.wte"),
        ("t5", "shared", "encoder.embed_tokens"),
        ("bart", "decoder.embed_tokens", "model.shared"),
        ("gemma", "embed_tokens", "lm_head"),
    ],
)
def test_tied_embedding_is_refused_by_name(family: str, target: str, other: str) -> None:
    model = tiny_lm(family)
    with pytest.raises(ConfigError, match=rf"lora.targets=.*{target}: shares its weight with '{other}'"):
        inject(model, LoraSpec(targets=[target], r=2), groups={})
    assert not adapted_layers(model)


@pytest.mark.parametrize("family", ["gpt2", "gemma", "llama"])
def test_untied_embeddings_can_be_adapted(family: str) -> None:
    model = tiny_lm(family, tie_word_embeddings=False)
    before = lm_logits(model)
    targets = ["wte" if family == "gpt2" else "embed_tokens", "lm_head"]
    inject(model, LoraSpec(targets=targets, r=2, alpha=3.0), groups={})
    assert torch.equal(lm_logits(model), before)
    trained(model)
    after = lm_logits(model)
    merge(model)
    torch.testing.assert_close(lm_logits(model), after, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert torch.equal(lm_logits(model), after)


@pytest.mark.parametrize("family", ["opt", "bart"])
def test_position_table_that_counts_by_itself_is_refused(family: str) -> None:
    with pytest.raises(ConfigError, match="LearnedPositionalEmbedding; only Linear, Conv1D, Embedding, Convolution"):
        inject(tiny_lm(family), LoraSpec(targets=["embed_positions"], r=2), groups={})


EXPERTS = {"mlp": ["mlp.experts"], "default": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("target", ["mlp", "experts", "mlp.experts", "experts.gate_up_proj", "down_proj", "re:.*mlp.*"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_in_one_parameter_are_refused_with_the_reason(family: str, target: str) -> None:
    with pytest.raises(ConfigError, match=r"layers.0.mlp.experts' keeps all experts in one 3-D parameter") as error:
        inject(tiny_lm(family), LoraSpec(targets=[target], r=2), groups=EXPERTS)
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_all_linear_says_that_it_leaves_out_experts_and_the_output(family: str) -> None:
    injection = inject(tiny_lm(family), LoraSpec(targets=["all-linear"], r=2), groups={}, skip=["lm_head"])
    assert {name.rpartition(".")[2] for row in injection.rows for name in row.modules} == {
        f"{part}_proj" for part in "qkvo"
    }
    assert set(injection.left_out) == {"mlp.experts", "mlp.gate", "lm_head"}


def test_all_linear_takes_gpt2s_projections_and_no_embedding() -> None:
    injection = inject(tiny_lm("gpt2"), LoraSpec(targets=["all-linear"], r=2), groups={}, skip=["lm_head"])
    assert {name.split(".", 3)[3] for row in injection.rows for name in row.modules} == {
        "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"
    }  # fmt: skip
    assert injection.left_out == ("lm_head",)


def test_named_targets_leave_nothing_out() -> None:
    assert inject(tiny_lm("mixtral"), LoraSpec(targets=["default"], r=2), groups=EXPERTS).left_out == ()


@pytest.mark.parametrize("family", LM_CONFIGS)
def test_all_linear_merges_in_every_family(family: str) -> None:
    model = tiny_lm(family)
    before = lm_logits(model)
    inject(model, LoraSpec(targets=["all-linear"], r=2, variant="dora"), groups={}, skip=["lm_head"])
    torch.testing.assert_close(lm_logits(model), before, rtol=1e-5, atol=1e-5)
    trained(model)
    after = lm_logits(model)
    merge(model)
    torch.testing.assert_close(lm_logits(model), after, rtol=1e-3, atol=1e-3)
    unmerge(model)
    assert torch.equal(lm_logits(model), after)


def test_trained_bias_of_a_conv1d_leaves_its_weight_narrow() -> None:
    model = tiny_lm("gpt2").bfloat16()
    inject(model, LoraSpec(targets=["c_attn:q+v", "mlp.c_fc"], r=2, bias="lora_only"), groups={})
    for layer in adapted_layers(model).values():
        assert (layer.base_layer.weight.dtype, layer.bias.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert lm_logits(model).isfinite().all()


def test_module_with_untrained_state_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(ConfigError, match=r"lora.modules_to_save=1: .*num_batches_tracked"):
        inject(model, LoraSpec(targets=["0"], r=2, modules_to_save=["1"]), groups={})


def test_adapting_twice_is_refused(bert: nn.Module) -> None:
    adapt(bert)
    with pytest.raises(UserError, match="adapted already"):
        adapt(bert, targets=["key"])


def test_remove_restores_the_model(bert: nn.Module) -> None:
    plain = tiny("bert")
    adapt(bert, targets=["all-linear"])
    for layer in adapted_layers(bert).values():
        nn.init.ones_(layer.B)
    remove(bert)
    assert [type(m) for m in bert.modules()] == [type(m) for m in plain.modules()]
    for (name, ours), (expected, theirs) in zip(bert.named_parameters(), plain.named_parameters(), strict=True):
        assert name == expected
        assert torch.equal(ours, theirs)


def test_remove_after_merge_keeps_the_update(bert: nn.Module) -> None:
    adapt(bert, variant="dora")
    trained(bert)
    expected = logits(bert)
    changes = merge(bert)
    remove(bert)
    torch.testing.assert_close(logits(bert), expected, rtol=1e-4, atol=1e-5)
    assert not adapted_layers(bert)
    assert len(changes) == 4
    assert min(changes.values()) > 0


def test_merge_is_all_or_nothing(bert: nn.Module) -> None:
    adapt(bert)
    trained(bert)
    before = logits(bert)
    last = list(adapted_layers(bert).values())[-1]
    last.A.data[0, 0] = float("inf")
    with pytest.raises(AdapterError, match=r"layer.1.attention.self.value: the merged weight is not finite"):
        merge(bert)
    assert not any(layer.is_merged for layer in adapted_layers(bert).values())
    last.A.data[0, 0] = 0
    assert before.isfinite().all()


def test_trained_base_tensors_become_fp32_and_run_under_autocast(bert: nn.Module) -> None:
    bert.to(torch.bfloat16)
    adapt(bert, bias="all", variant="dora")
    assert {p.dtype for p in bert.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(bert).isfinite().all()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["none", "all"]), st.sampled_from(["lora", "dora"]))
def test_state_comes_back_bit_for_bit(seed: int, bias: str, variant: str) -> None:
    model, other = _mlp(), _mlp()
    for net in (model, other):
        inject(net, LoraSpec(targets=["0"], r=2, bias=bias, variant=variant), groups={}, fresh=["2"])
    state = trainable_state(trained(model, seed))
    load_trainable_state(other, state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    trained(model, seed + 1)
    assert torch.equal(other.get_parameter("0.A"), state["0.A"])


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("0.A"), "0.A is missing"),
        (lambda s: s.update(x=torch.ones(1)), "x is not trained here"),
        (lambda s: s.update({"0.A": torch.ones(3, 6)}), "0.A has shape"),
    ],
)
def test_state_that_does_not_fit_is_refused(change: Any, text: str) -> None:
    model = _mlp()
    inject(model, LoraSpec(targets=["0"], r=2), groups={})
    before = copy.deepcopy(model.state_dict())
    state = trainable_state(trained(copy.deepcopy(model)))
    change(state)
    with pytest.raises(AdapterError, match=text):
        load_trainable_state(model, state)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_groups_hold_every_trained_parameter_once(bert: nn.Module) -> None:
    injection = adapt(bert, bias="all", variant="dora")
    groups = parameter_groups(bert, injection, lr=1e-3, head_lr=1e-4, weight_decay=0.1)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, p in bert.named_parameters() if p.requires_grad)
    for group in groups:
        assert group["lr"] == (1e-4 if group["names"][0].startswith("classifier") else 1e-3)
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] == 0.1}
        assert [bert.get_parameter(name) is p for name, p in zip(group["names"], group["params"], strict=True)]
    torch.optim.AdamW(groups)


def test_head_learns_at_the_common_rate_unless_told_otherwise(bert: nn.Module) -> None:
    injection = adapt(bert)
    groups = parameter_groups(bert, injection, lr=1e-3, head_lr=None, weight_decay=0.0)
    assert {group["lr"] for group in groups} == {1e-3}


@pytest.mark.parametrize(
    "spec", [{}, {"scaling": "alpha/sqrt(r)"}, {"variant": "dora"}], ids=["lora", "rslora", "dora"]
)
def test_only_b_learns_faster_in_lora_plus(bert: nn.Module, spec: dict[str, Any]) -> None:
    injection = adapt(bert, b_lr_ratio=16.0, bias="all", **spec)
    groups = parameter_groups(bert, injection, lr=1e-3, head_lr=1e-4, weight_decay=0.1)
    rates = {name.rpartition(".")[2]: group["lr"] for group in groups for name in group["names"] if "query" in name}
    expected = {"A": 1e-3, "B": 16e-3, "bias": 1e-3} | ({"magnitude": 1e-3} if spec.get("variant") == "dora" else {})
    assert rates == pytest.approx(expected)
    assert {group["lr"] for group in groups if group["names"][0].startswith("classifier")} == {1e-4}
    assert sum(len(group["names"]) for group in groups) == len(trainable_state(bert))


def test_no_factor_of_an_embedding_learns_faster() -> None:
    model = tiny_lm("llama", tie_word_embeddings=False)
    injection = inject(model, LoraSpec(targets=["embed_tokens", "q_proj"], r=2, b_lr_ratio=16.0), groups={})
    groups = parameter_groups(model, injection, lr=1e-3, head_lr=None, weight_decay=0.0)
    fast = {name for group in groups if group["lr"] > 1e-3 for name in group["names"]}
    assert fast == {f"model.layers.{i}.self_attn.q_proj.B" for i in (0, 1)}


def test_first_step_of_lora_plus_moves_b_so_many_times_as_far() -> None:
    moved = {}
    for ratio in (1.0, 16.0):
        model = tiny("bert")
        injection = adapt(model, b_lr_ratio=ratio)
        before = trainable_state(trained(model))
        optimizer = torch.optim.Adam(
            parameter_groups(model, injection, lr=1e-3, head_lr=None, weight_decay=0.0), eps=1e-30
        )
        ids = torch.tensor([[2, 5, 9, 11, 30, 3]])
        model(input_ids=ids).logits.square().sum().backward()
        optimizer.step()
        after = trainable_state(model)
        moved[ratio] = {name: (after[name] - before[name]).abs().mean().item() for name in before}
    for name, distance in moved[1.0].items():
        assert moved[16.0][name] == pytest.approx(distance * (16 if name.endswith(".B") else 1), rel=1e-3)


def test_adapter_follows_the_models_mode() -> None:
    model = tiny("bert").train()
    adapt(model, dropout=0.5)
    assert all(layer.training for layer in adapted_layers(model).values())


@pytest.mark.parametrize("relative", [True, False])
def test_deberta_v1_uses_the_update_of_in_proj_on_every_path(relative: bool) -> None:
    model = tiny("deberta", relative_attention=relative)
    before = logits(model)
    adapt(model, targets=["in_proj"], fresh=FRESH["deberta"])
    trained(model)
    after = logits(model)
    attention = model.get_submodule("deberta.encoder.layer.0.attention.self")
    effective = attention.in_proj.weight.clone()
    merge(model)
    assert torch.equal(attention.in_proj.weight, effective)
    torch.testing.assert_close(logits(model), after, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before)
