from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from lora_cli.families import FAMILIES, layer_groups
from lora_cli.models import load_base
from lora_cli.spec import ModelSpec

MODEL_FILES = sorted(Path(__file__).parents[1].joinpath("conf", "model").glob("[!_]*.yaml"))
TINY_FILES = [file for file in MODEL_FILES if file.stem.startswith("tiny-")]


def read(file: Path) -> dict[str, object]:
    return yaml.safe_load(file.read_text())


def matches(name: str, pattern: str) -> bool:
    """The contract of lora.targets, written down a second time."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return f".{name}".endswith(f".{pattern}")


@pytest.fixture(params=TINY_FILES, ids=lambda file: file.stem)
def tiny(request: pytest.FixtureRequest):
    spec = ModelSpec(**read(request.param))
    return load_base(spec, num_outputs=2, labels=None, problem="classification", seed=0)


def linears(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def test_every_name_of_every_group_is_a_linear_layer(tiny):
    names = linears(tiny.model)
    lonely = [p for group in tiny.groups.values() for p in group if not any(matches(name, p) for name in names)]
    assert lonely == []


def test_attention_and_mlp_share_no_layer_and_leave_only_the_edges(tiny):
    names = linears(tiny.model)
    attention = {name for name in names if any(matches(name, p) for p in tiny.groups["attention"])}
    mlp = {name for name in names if any(matches(name, p) for p in tiny.groups["mlp"])}
    rest = set(names) - attention - mlp
    edges = ("classifier", "pre_classifier", "pooler", "head.", "embeddings_project", "embedding_hidden_mapping_in")
    assert not attention & mlp
    assert [name for name in rest if not any(edge in name for edge in edges)] == []


def test_default_layers_are_attention_layers(tiny):
    assert set(tiny.groups["default"]) <= set(tiny.groups["attention"])


def test_default_is_pefts_where_peft_has_one():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT

    for family in FAMILIES:
        ours = [name.rsplit(".", 1)[-1] for name in FAMILIES[family].default]
        assert family not in PEFT or sorted(ours) == sorted(PEFT[family]), family


def test_each_family_has_a_tiny_model():
    assert {read(file)["family"] for file in TINY_FILES} | {"xlm-roberta"} == set(FAMILIES)


@pytest.mark.parametrize("file", MODEL_FILES, ids=lambda file: file.stem)
def test_model_file_has_known_keys_its_own_name_and_one_source(file):
    values = read(file)
    assert set(values) <= {field.name for field in fields(ModelSpec)}
    spec = ModelSpec(**values)
    assert spec.name == file.stem
    assert spec.family in FAMILIES
    assert (spec.hub is None) != (spec.random is None)


def test_named_targets_replace_the_default_group_only():
    assert layer_groups("bert", ["key"]) == layer_groups("bert") | {"default": ("key",)}


def test_unknown_family_has_no_groups_unless_the_model_names_its_layers():
    assert layer_groups("t5") == {}
    assert layer_groups("t5", ["q", "v"]) == {"default": ("q", "v")}
