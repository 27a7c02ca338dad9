"""Rows of new tokens: they alone train, come back from disk, and PEFT reads and writes the same."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_cli.errors import AdapterError, ConfigError
from lora_cli.nn.adapter import load_adapter, save_adapter
from lora_cli.nn.inject import (
    Injection,
    inject,
    load_trainable_state,
    merge,
    parameter_groups,
    remove,
    trainable_state,
    unmerge,
)
from lora_cli.nn.tokens import TokenRows, draw_rows, token_layers, vocabulary_layers
from lora_cli.spec import LoraSpec

from .models import LM_CONFIGS, tiny, tiny_lm, trained

NEW = (40, 41, 42)
TARGETS = {"gpt2": "c_attn", "t5": "q", "bloom": "query_key_value", "gpt_neox": "query_key_value"}
TARGETS |= {"falcon": "query_key_value", "phi3": "qkv_proj"}
TIED = {"gpt2": True, "llama": False, "t5": True}
FAMILIES = pytest.mark.parametrize("family", TIED)


def grown(family: str, **settings: Any) -> nn.Module:
    """The tiny model with three tokens more, their rows drawn."""
    model = tiny_lm(family, **settings)
    model.resize_token_embeddings(43, mean_resizing=False)
    draw_rows(model, dict(zip(NEW, ("<a>", "<b>", "<c>"), strict=True)), num_known=40, seed=0)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    """Output for two rows, with new tokens among the old."""
    ids = torch.tensor([[2, 40, 9, 42, 30, 3], [2, 8, 41, 41, 17, 38]])
    batch = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids, **batch).logits
    return result


def adapt(model: nn.Module, *, targets: list[str] | None = None, **spec: Any) -> Injection:
    targets = [TARGETS.get(model.config.model_type, "q_proj")] if targets is None else targets
    return inject(model, LoraSpec(r=2, alpha=4.0, targets=targets, **spec), groups={}, new_rows=NEW)


def save(model: nn.Module, injection: Injection, folder: Path) -> None:
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    save_adapter(model, injection, folder, base_name="tiny", revision=None, task_type=task, fingerprint=None, extra={})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = grown("gpt2")
    injection = adapt(model)
    save(trained(model), injection, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("family", [*LM_CONFIGS])
def test_a_new_layer_computes_what_its_base_does(family: str) -> None:
    model = grown(family).double()
    before = logits(model)
    adapt(model)
    for layer in token_layers(model).values():
        assert layer.new_rows.dtype == torch.float32
    torch.testing.assert_close(logits(model.double()), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", [*LM_CONFIGS])
def test_rows_computed_apart_are_rows_in_the_weight(family: str) -> None:
    model = grown(family)
    adapt(model)
    after = logits(trained(model).double())
    reference = grown(family).double()
    adapt(reference, targets=[TARGETS.get(family, "q_proj")])
    load_trainable_state(reference, trainable_state(model))
    merge(reference)
    remove(reference)
    assert not [module for module in reference.modules() if isinstance(module, TokenRows)]
    torch.testing.assert_close(logits(reference), after, rtol=0, atol=1e-5)


@FAMILIES
def test_a_tied_weight_has_its_rows_once(family: str) -> None:
    model = grown(family)
    injection = adapt(model)
    layers = token_layers(model)
    assert len(layers) == (1 if TIED[family] else 2)
    assert injection.rows[-1].pattern == "new tokens"
    assert injection.rows[-1].modules == tuple(layers)
    assert injection.rows[-1].num_parameters == len(layers) * 3 * 16
    assert injection.num_trainable == injection.num_adapter == sum(row.num_parameters for row in injection.rows)
    rows = [module for module in model.modules() if isinstance(module, TokenRows)]
    assert len({id(module.new_rows) for module in rows}) == len(layers)
    assert len(rows) == sum(map(len, vocabulary_layers(model).values()))


@FAMILIES
def test_only_the_new_rows_train(family: str) -> None:
    model = grown(family)
    before = {name: tensor.clone() for name, tensor in grown(family).named_parameters()}
    injection = adapt(model, targets=[])
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{name}.new_rows" for name in token_layers(model)}
    groups = parameter_groups(model, injection, lr=0.1, head_lr=1.0, weight_decay=0.0)
    assert {group["lr"] for group in groups} == {0.1}
    optimizer = torch.optim.AdamW(groups)
    ids = torch.tensor([[2, 40, 9, 42, 30, 41, 3]])
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    merge(model)
    remove(model)
    for name, parameter in model.named_parameters():
        first = [first for first, all_names in vocabulary_layers(model).items() if name.startswith(all_names)]
        if first:
            assert torch.equal(parameter[:40], before[name][:40])
            assert not (parameter[40:] == before[name][40:]).all(1).any()
        else:
            assert torch.equal(parameter, before[name]), name


@FAMILIES
def test_gradients_are_those_of_the_rows_of_a_trained_embedding(family: str) -> None:
    plain, ours = grown(family), grown(family)
    adapt(ours, targets=[])
    ids = torch.tensor([[2, 40, 9, 42, 30, 3, 42]])
    for model in (plain, ours):
        model(input_ids=ids, labels=ids).loss.backward()
    for name, layer in token_layers(ours).items():
        expected = plain.get_submodule(name).weight.grad[list(NEW)]
        torch.testing.assert_close(layer.new_rows.grad, expected, rtol=1e-4, atol=1e-6)


@FAMILIES
def test_merging_can_be_undone_bit_for_bit(family: str) -> None:
    model = grown(family)
    adapt(model)
    weights = {name: p.clone() for name, p in trained(model).named_parameters()}
    after = logits(model)
    changes = merge(model)
    assert set(token_layers(model)) <= set(changes)
    torch.testing.assert_close(logits(model), after, rtol=1e-4, atol=1e-5)
    with pytest.raises(AdapterError, match="merged already"):
        merge(model)
    unmerge(model)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), after)
    with pytest.raises(AdapterError, match="not merged"):
        unmerge(model)


def test_the_effective_weight_is_the_merged_one() -> None:
    model = grown("gpt2")
    adapt(model)
    layer = trained(model).get_submodule("lm_head")
    effective = layer.weight
    merge(model)
    assert torch.equal(layer.weight, effective)


def test_a_row_that_a_narrow_base_cannot_hold_is_not_merged() -> None:
    model = grown("gpt2").half()
    adapt(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        token_layers(model)["transformer.wte"].new_rows[0, 0] = 1e6
    with pytest.raises(AdapterError, match=r"transformer\.wte: a row is not finite"):
        merge(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if "new_rows" not in name)


@FAMILIES
def test_removing_puts_the_base_back(family: str) -> None:
    model, before = grown(family), logits(grown(family))
    names = [name for name, _ in model.named_parameters()]
    adapt(model)
    trained(model)
    with pytest.raises(AdapterError, match="adapted already"):
        adapt(model, targets=[])
    remove(model)
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_parameters()] == names
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight or not TIED[family]


@FAMILIES
def test_state_and_copies_carry_the_rows(family: str) -> None:
    model, again = grown(family), grown(family)
    adapt(model)
    adapt(again)
    load_trainable_state(again, trainable_state(trained(model)))
    assert torch.equal(logits(again), logits(model))
    twin = copy.deepcopy(model)
    merge(twin)
    unmerge(twin)
    assert torch.equal(logits(twin), logits(model))


@FAMILIES
def test_rows_come_back_from_disk(family: str, tmp_path: Path) -> None:
    model = grown(family)
    injection = adapt(model)
    save(trained(model), injection, tmp_path / "adapter")
    again = grown(family)
    found = load_adapter(again, tmp_path / "adapter", fresh=(), fingerprint=None)
    assert torch.equal(logits(again), logits(model))
    assert (found.num_trainable, found.rows[-1]) == (injection.num_trainable, injection.rows[-1])
    save(again, found, tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()


def test_a_classifier_reads_new_tokens(tmp_path: Path) -> None:
    def bert() -> nn.Module:
        model = tiny("bert")
        model.resize_token_embeddings(43, mean_resizing=False)
        draw_rows(model, {40: "<a>", 41: "<b>", 42: "<c>"}, num_known=40, seed=0)
        return model.eval()

    model = bert()
    injection = inject(model, LoraSpec(targets=["query"]), groups={}, fresh=("classifier",), new_rows=NEW)
    assert list(token_layers(model)) == ["bert.embeddings.word_embeddings"]
    save_adapter(
        trained(model),
        injection,
        tmp_path / "a",
        base_name="x",
        revision=None,
        task_type="SEQ_CLS",
        fingerprint=None,
        extra={},
    )
    again, peft = bert(), into_peft(bert(), tmp_path / "a")
    load_adapter(again, tmp_path / "a", fresh=("classifier",), fingerprint=None)
    assert torch.equal(logits(again), logits(model))
    torch.testing.assert_close(logits(peft), logits(model), rtol=0, atol=1e-5)


def into_peft(base: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder)).eval()


PEERS = ["gpt2", "llama", "t5", "opt", "gemma", "qwen3", "bloom", "gpt_neox", "phi3", "gemma3_text"]


@pytest.mark.parametrize("family", PEERS)
@pytest.mark.parametrize("targets", [None, []], ids=["lora", "rows-only"])
def test_peft_computes_what_we_do(targets: list[str] | None, family: str, tmp_path: Path) -> None:
    model = grown(family)
    injection = adapt(model, targets=targets)
    save(trained(model), injection, tmp_path / "adapter")
    peft = into_peft(grown(family), tmp_path / "adapter")
    torch.testing.assert_close(logits(peft.double()), logits(model.double()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("form", ["list", "names"])
def test_we_compute_what_peft_does(form: str, family: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    indices: Any = [42, 5, 40]
    if form == "names":
        indices = {"gpt2": {"wte": indices}, "t5": {"shared": indices}}.get(
            family, {"embed_tokens": indices, "lm_head": [41, 7]}
        )
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    config = LoraConfig(
        r=4,
        target_modules=[TARGETS.get(family, "q_proj")],
        init_lora_weights=False,
        task_type=task,
        trainable_token_indices=indices,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(grown(family), config)
        trained(peft, 5).save_pretrained(tmp_path / "peft")
    model = grown(family)
    load_adapter(model, tmp_path / "peft", fresh=(), fingerprint=None)
    torch.testing.assert_close(logits(model.double()), logits(peft.eval().double()), rtol=0, atol=1e-6)


def test_the_whole_embedding_that_peft_may_add_is_passed_over(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("trainable_tokens_delta"))
    whole = key.replace("trainable_tokens_delta", "base_layer.weight")
    save_file(tensors | {whole: torch.full((43, 16), 9.0)}, path)
    model = grown("gpt2")
    load_adapter(model, folder, fresh=(), fingerprint=None)
    assert not (model.get_submodule("lm_head").base_layer.weight == 9).any()


def refusal(folder: Path, model: nn.Module | None = None) -> str:
    model = model or grown("gpt2")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(AdapterError) as error:
        load_adapter(model, folder, fresh=(), fingerprint=None)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert len(str(error.value)) <= 300
    return str(error.value)


@pytest.mark.parametrize(
    "value",
    [[1, 1], [-1], [True], ["1"], [1.0], "wte", 3, {"wte": []}, {"wte": 3}, {"": [1]}, {"wte": [1, None]}],
)
def test_malformed_numbers_are_refused(value: object, folder: Path) -> None:
    edit(folder, trainable_token_indices=value)
    assert "trainable_token_indices" in refusal(folder)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"nowhere": [1]}, "nowhere is no embedding of tokens here"),
        ({"wpe": [1]}, "wpe is no embedding of tokens here"),
        ({"wte": [40, 41], "lm_head": [40]}, "two lists for transformer.wte"),
        ([40, 41], "this model needs [2, 16]"),
        (None, "do not belong to this adapter"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(value: object, says: str, folder: Path) -> None:
    edit(folder, trainable_token_indices=value)
    assert says in refusal(folder)


def test_a_base_without_the_tokens_is_told_how_to_get_them(folder: Path) -> None:
    assert "a row for token 42, but transformer.wte has 40 rows" in refusal(folder, tiny_lm("gpt2"))
    assert "model.add_tokens" in refusal(folder, tiny_lm("gpt2"))


def edit(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("family", "spec", "says"),
    [
        ("llama", {"targets": ["embed_tokens"]}, "lora.targets=model.embed_tokens"),
        ("llama", {"targets": ["q_proj", "lm_head"]}, "lora.targets=lm_head"),
        ("phi", {"bias": "all"}, "lora.bias=all"),
    ],
)
def test_what_cannot_train_besides_is_refused(family: str, spec: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace(".", r"\.")):
        adapt(grown(family), **spec)


def test_a_layer_that_trains_whole_needs_no_rows() -> None:
    model = grown("llama")
    injection = adapt(model, modules_to_save=["embed_tokens"])
    assert list(token_layers(model)) == ["lm_head"]
    assert injection.trained_whole == ("model.embed_tokens",)


def test_a_model_that_hides_its_embedding_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.add_tokens=1: the model does not tell"):
        inject(nn.Sequential(nn.Embedding(3, 4)), LoraSpec(targets=[]), groups={}, new_rows=[1])


def test_a_start_depends_on_seed_layer_and_token_only() -> None:
    def start(tokens: dict[int, str], seed: int = 0) -> torch.Tensor:
        model = tiny_lm("gpt2")
        model.resize_token_embeddings(43, mean_resizing=False)
        draw_rows(model, tokens, num_known=40, seed=seed)
        return model.get_input_embeddings().weight.detach()

    both = start({40: "<a>", 41: "<b>"})
    assert torch.equal(start({42: "<a>"})[42], both[40])
    assert not torch.equal(both[40], both[41])
    assert not torch.equal(start({40: "<a>"}, seed=1)[40], both[40])
    known = both[:40].double()
    distance = (both[40].double() - known.mean(0)) / known.std(0, correction=0)
    assert 0 < distance.abs().mean() < 0.2
