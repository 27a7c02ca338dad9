"""Tokens of prompts and answers: special ones come from us alone, cuts fall in cells, targets are marked by place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.errors import ConfigError, ModelError
from lora_cli.tasks import sequences
from lora_cli.tasks.prompts import Prompt, Template
from lora_cli.tasks.sequences import IGNORED, TextExample, Writer, collate, learnt
from tasks.readers import DECODERS, READERS, Reader, reader_like

ANSWER = {"task.max_target_length": 4}
TEMPLATE = Template("[{a}|{b}]", "task.prompt")


@pytest.fixture(scope="module", params=READERS)
def reader(request: pytest.FixtureRequest) -> Reader:
    return reader_like(request.param)


@pytest.fixture(scope="module")
def writer(reader: Reader) -> Writer:
    return Writer(reader.tokenizer, reader.decoder_start)


def prompt_of(a: str, b: str = "") -> Prompt:
    return TEMPLATE.render({"a": a, "b": b}, "here")


@pytest.mark.parametrize("family", READERS)
def test_prompts_begin_and_end_as_the_models_do(family: str) -> None:
    reader = reader_like(family)
    writer = Writer(reader.tokenizer, reader.decoder_start)
    tokens = reader.tokenizer.convert_tokens_to_ids
    (plain, marked), _ = writer.prompts([Prompt("at", ()), Prompt("at", (), ends=True)], 20, "right")
    bare = reader.tokenizer("at", add_special_tokens=False)["input_ids"]
    (target,), _ = writer.targets(["at"], 20)
    begin, end, answer = {
        "gpt2": ([], [], []),
        "opt": (["</s>"], [], []),
        "llama": (["<s>"], [], []),
        "t5": ([], ["</s>"], []),
        "bart": (["<s>"], ["</s>"], ["<s>"]),
    }[family]
    assert plain == [*tokens(begin), *bare, *tokens(end)]
    assert marked == [*tokens(begin), *bare, reader.eos]
    assert target == [*tokens(answer), *bare, reader.eos]


def test_special_tokens_in_a_text_are_text(reader: Reader, writer: Writer) -> None:
    special = reader.tokenizer.all_special_tokens
    text = " ".join(["the", *special, "{eos}"])
    (ids,), _ = writer.prompts([prompt_of(text)], 500, "right")
    (target,), _ = writer.targets([text], 500)
    plain = writer.plain([text])[0]
    marks = {token for token in reader.tokenizer.all_special_ids if token != reader.tokenizer.unk_token_id}
    before, after = len(writer.before), int(writer.decoder_start is not None)
    assert marks.isdisjoint(ids[before : len(ids) - after])
    assert marks.isdisjoint(target[before * after : -1])
    assert marks.isdisjoint(plain[before:-1])
    assert "{eos}" in reader.tokenizer.decode(ids)


def test_an_empty_prompt_of_a_decoder_still_has_something_to_follow(reader: Reader, writer: Writer) -> None:
    (ids,), _ = writer.prompts([Prompt("", ())], 9, "right")
    assert len(ids) >= 1
    assert set(ids) <= set(reader.tokenizer.all_special_ids)


words = st.text(st.sampled_from("the in an xyz é😀<>s/|"), max_size=30)


@settings(max_examples=60, deadline=None)
@given(a=words, b=words, budget=st.integers(6, 40), side=st.sampled_from(["left", "right"]), ends=st.booleans())
def test_a_prompt_is_cut_in_its_cells_and_never_beyond_its_budget(
    reader: Reader, writer: Writer, a: str, b: str, budget: int, side: str, ends: bool
) -> None:
    template = Template("[{a}|{b}]" + "{eos}" * ends, "task.prompt")
    prompts = [template.render(row, "") for row in ({"a": a, "b": b}, {"a": "", "b": ""})]
    (whole, bare), _ = writer.prompts(prompts, 10_000, side)
    (found, _), (was_cut, _) = writer.prompts(prompts, budget, side)
    assert len(found) == min(len(whole), budget)
    assert was_cut == (len(whole) > budget)
    assert was_cut or found == whole
    if len(bare) <= budget:
        text = reader.tokenizer.decode(found, skip_special_tokens=True).replace(" ", "")
        assert (text[:1], text[-1:]) == ("[", "]")
        assert "|" in text


def test_the_longest_cell_is_cut_at_the_named_side() -> None:
    reader = reader_like("gpt2")
    writer = Writer(reader.tokenizer, None)

    def kept(side: str, budget: int) -> str:
        (ids,), _ = writer.prompts([prompt_of("0123456789", "abc")], budget, side)
        return str(reader.tokenizer.decode(ids))

    assert [kept("right", 12), kept("left", 12)] == ["[012345|abc]", "[456789|abc]"]
    assert [kept("right", 5), kept("left", 5)] == ["[|ab]", "[|bc]"]
    assert [kept("right", 2), kept("left", 2)] == ["[|", "|]"]


def test_many_prompts_are_tokenized_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(reader_like("t5").tokenizer, 0)
    prompts = [prompt_of("then", "in " * number) for number in range(5)]
    wanted = writer.prompts(prompts, 9, "right")
    assert len(set(wanted[1])) == 2
    monkeypatch.setattr(sequences, "AT_ONCE", 2)
    assert writer.prompts(prompts, 9, "right") == wanted


def test_a_huge_cell_is_clipped_before_it_is_tokenized() -> None:
    writer = Writer(reader_like("gpt2").tokenizer, None)
    prompts = [prompt_of("x" * 5_000_000 + "ab", "c")]
    for side, ending in (("right", "xx|c]"), ("left", "ab|c]")):
        (ids,), (was_cut,) = writer.prompts(prompts, 10, side)
        assert was_cut
        assert len(ids) == 10
        assert str(writer.tokenizer.decode(ids)).endswith(ending)
    (target,), (was_cut,) = writer.targets(["y" * 5_000_000], 10)
    assert was_cut
    assert len(target) == 10


@settings(max_examples=60, deadline=None)
@given(text=words, most=st.integers(2, 12))
def test_an_answer_ends_with_the_end_mark_even_when_cut(reader: Reader, writer: Writer, text: str, most: int) -> None:
    (whole,), _ = writer.targets([text], 1000)
    (found,), (was_cut,) = writer.targets([text], most)
    assert found == [*whole[: most - 1], reader.eos] if was_cut else found == whole
    assert len(found) <= most
    assert was_cut == (len(whole) > most)


def test_a_decoder_shares_its_positions_between_prompt_and_answer() -> None:
    writer = Writer(reader_like("llama", max_length=20).tokenizer, None)
    assert writer.budget(100, ANSWER) == 16
    assert writer.budget(10, ANSWER) == 10
    with pytest.raises(ConfigError, match=r"task\.decode\.max_new_tokens=18: at most 17: the model has 20 positions"):
        writer.budget(100, ANSWER | {"task.decode.max_new_tokens": 18})


def test_an_encoder_decoder_does_not() -> None:
    reader = reader_like("bart", max_length=20)
    writer = Writer(reader.tokenizer, reader.decoder_start)
    assert writer.budget(100, ANSWER) == 20
    with pytest.raises(ConfigError, match=r"task\.max_target_length=21: at most 20"):
        writer.budget(100, {"task.max_target_length": 21})


@settings(max_examples=40, deadline=None)
@given(text=st.text(st.sampled_from("ab<|im_end|></s>endoftext|> "), max_size=40))
def test_what_is_guarded_becomes_no_special_token(text: str) -> None:
    reader = reader_like("gpt2", special=("<|im_end|>", "<|im", "<|im_start|>"))
    writer = Writer(reader.tokenizer, None)
    assert writer.unguarded(writer.guarded(text)) == text
    (ids,) = writer.rendered([f"<|im_start|>{writer.guarded(text + '<|im_end|>')}<|im_end|>"])
    special = [token for token in ids if token in reader.tokenizer.all_special_ids]
    assert special == reader.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert reader.tokenizer.decode(ids) == f"<|im_start|>{text}<|im_end|><|im_end|>"


def test_a_slow_tokenizer_and_one_without_an_end_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="only fast tokenizers"):
        Writer(Slow(), None)
    endless = reader_like("gpt2").tokenizer
    endless.eos_token = None
    with pytest.raises(ModelError, match="no end mark"):
        Writer(endless, None)


PAD = 0
DECODED = [
    TextExample(0, [5, PAD, 6, 2], [IGNORED, PAD, 6, 2]),
    TextExample(1, [7, 2], [IGNORED, 2]),
    TextExample(2, [8, 9], [IGNORED, 9]),
]


def test_padding_is_marked_by_place_not_by_token() -> None:
    batch = collate(DECODED[:2], PAD)
    assert batch["input_ids"].tolist() == [[5, PAD, 6, 2], [7, 2, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, PAD, 6, 2], [IGNORED, 2, IGNORED, IGNORED]]
    logits = torch.arange(8.0).reshape(2, 4, 1)
    values, labels = learnt(logits, batch)
    assert (values.flatten().tolist(), labels.tolist()) == ([0, 1, 2, 4], [PAD, 6, 2, 2])


def test_an_encoder_decoders_answer_is_shifted_behind_its_start() -> None:
    examples = [TextExample(0, [5, 6, 1], [7, 8, 1], 3), TextExample(1, [5, 1], [1], 3)]
    batch = collate(examples, PAD)
    assert batch["decoder_input_ids"].tolist() == [[3, 7, 8], [3, PAD, PAD]]
    assert batch["labels"].tolist() == [[7, 8, 1], [1, IGNORED, IGNORED]]
    assert [example.num_tokens for example in examples] == [6, 3]
    assert [example.num_targets for example in examples] == [3, 1]
    assert learnt(torch.zeros(2, 3, 1), batch)[1].tolist() == [7, 8, 1, 1]


@pytest.mark.parametrize("family", DECODERS)
def test_plain_text_begins_and_ends_once(family: str) -> None:
    reader = reader_like(family)
    writer = Writer(reader.tokenizer, None)
    (ids,) = writer.plain(["the"])
    assert ids == [*writer.before, *reader.tokenizer("the", add_special_tokens=False)["input_ids"], reader.eos]
