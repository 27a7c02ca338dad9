"""A training of three steps writes an ordinary transformers folder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import pretrain
from denoising import SENTINELS

CLASSES = {"gpt2": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}
ANY_TEXT = "Żółw 🐢\t7  blanks\r\n\x00 Blue Spice <pad-"


@pytest.fixture(scope="module", params=["gpt2", "t5"])
def trained(request: pytest.FixtureRequest, toy_mirror: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(kind, folder)."""
    folder = tmp_path_factory.mktemp("models") / "a" / "small"
    pretrain.main([request.param, str(folder), "--data", str(toy_mirror), "--steps", "3"])
    return request.param, folder


def test_any_text_comes_back_from_the_tokenizer(trained: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained[1], trust_remote_code=False)
    ids = tokenizer(ANY_TEXT)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == ANY_TEXT
    assert (ids[-1] == tokenizer.eos_token_id) == (trained[0] == "t5")


def test_the_folder_loads_and_generates(trained: Any) -> None:
    kind, folder = trained
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = CLASSES[kind].from_pretrained(folder, trust_remote_code=False)
    out = model.generate(**tokenizer("They", return_tensors="pt"), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape[0] == 1
    assert model.config.vocab_size == len(tokenizer)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_same_steps_and_seed_make_the_same_weights(trained: Any, toy_mirror: Path, tmp_path: Path) -> None:
    kind, folder = trained
    pretrain.main([kind, str(tmp_path / "again"), "--data", str(toy_mirror), "--steps", "3"])
    weights, again = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "again"))
    torch.testing.assert_close(weights, again, rtol=0, atol=0)


def test_the_last_lines_say_how_good_and_where(
    toy_mirror: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain.main(["gpt2", "small", "--data", str(toy_mirror), "--steps", "1"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["gpt2", "held-out", said[2].split()[0], "small"]
    assert str(toy_mirror) not in "".join(said)


def test_without_a_mirror_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pretrain.main(["gpt2", "small", "--data", str(tmp_path)])
    assert "LORA_HUB_ROOT or --data names a folder that holds datasets/" in capsys.readouterr().err


def test_t5_has_a_token_for_each_sentinel_and_begins_with_padding(toy_mirror: Path) -> None:
    plan = pretrain.plan_t5(toy_mirror, 2, random.Random(0))
    assert [plan.tokenizer.decode([i]) for i in plan.tokenizer.convert_tokens_to_ids(SENTINELS)] == SENTINELS
    assert plan.tokenizer("<extra_id_7>")["input_ids"] == [
        plan.tokenizer.convert_tokens_to_ids("<extra_id_7>"),
        plan.tokenizer.eos_token_id,
    ]
    assert plan.model.config.decoder_start_token_id == plan.tokenizer.pad_token_id == 0
