from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from lora_cli.families import FAMILIES, layer_groups
from lora_cli.models import load_base
from lora_cli.nn import inject
from lora_cli.nn.fused import LAYOUTS
from lora_cli.nn.kinds import kind_of
from lora_cli.spec import LoraSpec, ModelSpec
from nn.models import LM_CONFIGS, tiny_lm

CONF = Path(__file__).parents[1] / "conf" / "model"
MODEL_FILES = sorted(CONF.glob("[!_]*.yaml"))
TINY_FILES = [file for file in MODEL_FILES if file.stem.startswith("tiny-")]
GENERATION = [family for family, layers in FAMILIES.items() if layers.kind != "encoder"]
EXPERTS = ("mixtral", "qwen3_moe")


def read(file: Path) -> dict[str, object]:
    return yaml.safe_load(file.read_text())


ENCODER_FILES = [file for file in TINY_FILES if read(file)["family"] not in GENERATION]


def matches(name: str, pattern: str) -> bool:
    """The contract of lora.targets, written down a second time."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return f".{name}".endswith(f".{pattern.split(':')[0]}")


@pytest.fixture(params=ENCODER_FILES, ids=lambda file: file.stem)
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


@pytest.fixture(params=GENERATION)
def generator(request: pytest.FixtureRequest) -> torch.nn.Module:
    return tiny_lm(request.param)


def projections(model: torch.nn.Module) -> list[str]:
    kinds = {name: kind_of(module) for name, module in model.named_modules()}
    return [name for name, kind in kinds.items() if kind and kind.is_projection]


def test_groups_of_generation_families_share_no_layer_and_leave_only_the_output(generator):
    names, groups = projections(generator), layer_groups(generator.config.model_type)
    attention, mlp = (
        {name for name in names if any(matches(name, p) for p in groups[group])} for group in ("attention", "mlp")
    )
    lonely = [p for group in groups.values() for p in group if not any(matches(name, p) for name in names)]
    assert lonely == (["mlp.experts"] if generator.config.model_type in EXPERTS else [])
    assert not attention & mlp
    assert set(names) - attention - mlp == {"lm_head"}


def test_default_of_generation_families_is_query_and_value(generator):
    family = generator.config.model_type
    inject(generator, LoraSpec(r=2), groups=layer_groups(family))
    parts = {name.rpartition(".")[2] for name, p in generator.named_parameters() if p.requires_grad}
    leaves = {name.split(".")[-2] for name, p in generator.named_parameters() if p.requires_grad}
    assert parts == {"A", "B"}
    assert {leaf.removesuffix("_proj") for leaf in leaves} in ({"q", "v"}, {"qkv"}, {"query_key_value"}, {"c_attn"})


def test_fused_defaults_name_the_parts_that_the_library_knows():
    for family in GENERATION:
        for pattern in FAMILIES[family].default:
            end, colon, parts = pattern.partition(":")
            assert not colon or (end in LAYOUTS[family] and parts == "q+v")


def test_generation_families_are_those_the_layer_tests_cover():
    assert set(GENERATION) == set(LM_CONFIGS)


@pytest.mark.parametrize("family", GENERATION)
def test_kind_is_the_one_in_the_config(family):
    is_both = tiny_lm(family).config.is_encoder_decoder
    assert FAMILIES[family].kind == ("encoder-decoder" if is_both else "decoder")


def test_default_is_pefts_where_peft_has_one():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT

    for family, layers in FAMILIES.items():
        ours = {name.partition(":")[0].rsplit(".", 1)[-1] for name in layers.default}
        # PEFT adapts Phi's MLP besides; the paper does not.
        theirs = set(PEFT.get(family, ours)) - {"fc1", "fc2"}
        assert ours == theirs, family


def test_each_understanding_family_has_a_tiny_model():
    assert {read(file)["family"] for file in ENCODER_FILES} | {"xlm-roberta", *GENERATION} == set(FAMILIES)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "neox", "opt", "t5", "bart"])
def test_tiny_generation_model_can_be_built_and_adapted(name):
    values = read(CONF / f"tiny-{name}.yaml")
    model = tiny_lm(values["family"], **values["random"])
    inject(model, LoraSpec(), groups=layer_groups(values["family"]))


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
    assert layer_groups("mamba") == {}
    assert layer_groups("mamba", ["q", "v"]) == {"default": ("q", "v")}
