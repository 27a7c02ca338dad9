"""Full fine-tuning: everything trains, tied weights as one, and all of it comes back from disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_cli.errors import AdapterError, ConfigError
from lora_cli.nn.adapter import fingerprint, load_adapter, read_adapter, save_adapter
from lora_cli.nn.inject import Injection, inject, load_trainable_state, parameter_groups, remove, trainable_state
from lora_cli.spec import LoraSpec

from .models import FAMILIES, FRESH, lm_logits, logits, tiny, tiny_lm, trained

FULL = LoraSpec(variant="full", targets=[])
WRITERS = ("gpt2", "llama", "t5", "bart")


def train_whole(model: nn.Module, fresh: tuple[str, ...] = ()) -> Injection:
    return inject(model, FULL, groups={}, fresh=fresh)


def save(model: nn.Module, injection: Injection, folder: Path, **options: Any) -> None:
    facts: dict[str, Any] = {"base_name": "tiny", "revision": "r1", "task_type": "CAUSAL_LM", "fingerprint": None}
    save_adapter(model, injection, folder, **(facts | {"extra": {"task": "x"}} | options))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny("bert")
    injection = train_whole(model, FRESH["bert"])
    save(trained(model), injection, tmp_path / "adapter", fingerprint=fingerprint(tiny("bert"), fresh=FRESH["bert"]))
    return tmp_path / "adapter"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_trains_and_nothing_is_changed_at_the_start(family: str) -> None:
    model = tiny(family)
    before = logits(model)
    injection = train_whole(model, FRESH[family])
    assert torch.equal(logits(model), before)
    assert all(p.requires_grad for p in model.parameters())
    assert injection.num_trainable == injection.num_total == sum(p.numel() for p in tiny(family).parameters())
    assert injection.num_adapter == 0
    assert injection.trained_whole == FRESH[family]
    heads = sum(p.numel() for name in FRESH[family] for p in model.get_submodule(name).parameters())
    assert [(row.pattern, row.num_parameters) for row in injection.rows] == [
        ("everything", injection.num_total - heads)
    ]


@pytest.mark.parametrize("family", WRITERS)
def test_a_written_model_comes_back_and_tied_weights_stand_there_once(family: str, tmp_path: Path) -> None:
    model = tiny_lm(family)
    injection = train_whole(model)
    save(trained(model), injection, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "model.safetensors")
    assert set(tensors) == {name for name, _ in model.named_parameters()}
    again = tiny_lm(family)
    assert not torch.equal(lm_logits(again), lm_logits(model))
    load_adapter(again, tmp_path / "adapter", fresh=(), fingerprint=None)
    assert torch.equal(lm_logits(again), lm_logits(model))
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_transformers_loads_what_was_written(family: str, tmp_path: Path) -> None:
    from lora_cli.models import save_config

    model = tiny_lm(family)
    save(trained(model), train_whole(model), tmp_path / "adapter")
    save_config(model, tmp_path / "adapter")
    again = type(model).from_pretrained(str(tmp_path / "adapter"), local_files_only=True).eval()
    assert torch.equal(lm_logits(again), lm_logits(model))


def test_peft_refuses_the_folder(folder: Path) -> None:
    from peft import PeftConfig

    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftConfig.from_pretrained(str(folder), local_files_only=True)


def test_gradients_are_those_of_a_model_that_nobody_touched() -> None:
    plain, ours = tiny_lm("gpt2"), tiny_lm("gpt2")
    train_whole(ours)
    ids = torch.tensor([[2, 5, 9, 11, 30, 3]])
    for model in (plain, ours):
        model(input_ids=ids, labels=ids).loss.backward()
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name


def test_head_has_a_rate_of_its_own_and_the_rest_another() -> None:
    model = tiny("bert")
    injection = train_whole(model, ("classifier",))
    groups = parameter_groups(model, injection, lr=1e-3, head_lr=1e-2, weight_decay=0.1)
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert {name for name, rate in rates.items() if rate == 1e-2} == {"classifier.weight", "classifier.bias"}
    assert set(rates) == {name for name, _ in model.named_parameters()}


def test_a_narrow_base_becomes_fp32() -> None:
    model = tiny_lm("llama").bfloat16()
    train_whole(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_state_goes_out_and_in() -> None:
    model, again = tiny_lm("t5"), tiny_lm("t5")
    train_whole(model)
    train_whole(again)
    load_trainable_state(again, trainable_state(trained(model)))
    assert torch.equal(lm_logits(again), lm_logits(model))


def test_removing_leaves_the_trained_model() -> None:
    model = tiny("bert")
    train_whole(model, FRESH["bert"])
    after = logits(trained(model))
    remove(model)
    assert torch.equal(logits(model), after)


def test_the_base_it_was_trained_from_is_checked(folder: Path) -> None:
    file = read_adapter(folder)
    assert (file.config.base_name, file.config.revision, file.config.spec) == ("tiny", "r1", FULL)
    assert file.extra == {"task": "x"}
    with pytest.raises(AdapterError, match="another base model"):
        load_adapter(tiny("bert"), folder, fresh=FRESH["bert"], fingerprint="other")


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    save_file(tensors | ({} if tensor is None else {name: tensor}), folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("classifier.bias", None, "1 tensors are missing: classifier.bias"),
        ("classifier.extra", torch.zeros(3), "do not belong to this adapter: classifier.extra"),
        ("classifier.bias", torch.zeros(4), r"classifier.bias has shape \[4\], this model needs \[3\]"),
        ("classifier.bias", torch.full((3,), torch.nan), "holds NaN or infinity"),
    ],
)
def test_what_does_not_fit_leaves_the_model_alone(
    name: str, tensor: torch.Tensor | None, says: str, folder: Path
) -> None:
    change(folder, name, tensor)
    model, before = tiny("bert"), logits(tiny("bert"))
    with pytest.raises(AdapterError, match=says):
        load_adapter(model, folder, fresh=FRESH["bert"], fingerprint=None)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("value", [3, [], {"revision": 3}])
def test_damaged_facts_are_refused(value: object, folder: Path) -> None:
    facts = json.loads((folder / "lora.json").read_text())
    (folder / "lora.json").write_text(json.dumps(facts | {"full": value}))
    with pytest.raises(AdapterError, match="full must be an object of texts"):
        read_adapter(folder)


def test_a_folder_without_its_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"model\.safetensors is missing"):
        read_adapter(folder)


def test_an_adapter_takes_the_place_of_a_whole_model_and_back(folder: Path) -> None:
    model = tiny("bert")
    injection = inject(model, LoraSpec(targets=["query"]), groups={}, fresh=FRESH["bert"])
    save(model, injection, folder, task_type="SEQ_CLS")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "lora.json",
    ]


@pytest.mark.parametrize(
    "also",
    [{"targets": ["query"]}, {"modules_to_save": ["x"]}, {"bias": "all"}, {"rank_pattern": {"query": 2}}],
)
def test_nothing_else_can_be_asked_for(also: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"lora\.{next(iter(also))}=.*everything trains"):
        LoraSpec(**({"variant": "full", "targets": []} | also))
