"""Answers: what a plain loop would write, whatever the batch; cut at stops and ends; and nothing said about it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from lora_cli.engine.device import open_device
from lora_cli.engine.generate import generate
from lora_cli.spec import DecodeSpec, DeviceSpec
from nn.models import LM_CONFIGS, tiny_lm

PAD, BOS, EOS, TURN = 0, 1, 2, 3
FAMILIES = ["gpt2", "opt", "gpt_neox", "bloom", "llama", "mistral", "qwen2", "gemma", "phi", "falcon", "t5", "bart"]
PROMPTS = [[1, 5, 6], [1, 9, 10, 11, 12, 13, 8], [1, 30], [1, 21, 22, 23, 24], [1, 17, 18, 19]]


@dataclass(frozen=True)
class Asked:
    input_ids: list[int]

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Forty tokens, each a text of its own."""
    words = ["<pad>", "<s>", "</s>", "<turn>", *(f"w{number} " for number in range(4, 40))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    return tokenizer


def answers(
    model: nn.Module, tokenizer, decode: DecodeSpec, *, batch_size: int = 8, prompts=PROMPTS, **more
) -> list[str]:
    queries = [Asked(list(ids)) for ids in prompts]
    device = open_device(DeviceSpec(name="cpu"))
    found = dict(generate(model, queries, decode, tokenizer=tokenizer, device=device, batch_size=batch_size, **more))
    assert len(found) == len(prompts)
    return [found[number] for number in range(len(prompts))]


def by_hand(model: nn.Module, tokenizer, prompt: list[int], length: int) -> str:
    """The likeliest token, again and again, everything computed anew."""
    ids, start = (list(prompt), len(prompt)) if not model.config.is_encoder_decoder else ([0], 1)
    while len(ids) - start < length:
        inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([ids])}
        if not model.config.is_encoder_decoder:
            inputs = {"input_ids": torch.tensor([ids])}
        with torch.no_grad():
            token = model(**inputs, use_cache=False).logits[0, -1].argmax().item()
        if token == EOS:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_that_of_a_plain_loop_whatever_the_batch(family: str, tokenizer) -> None:
    model, decode = tiny_lm(family), DecodeSpec(max_new_tokens=8)
    expected = [by_hand(model, tokenizer, prompt, 8) for prompt in PROMPTS]
    assert len(set(expected)) > 1
    assert answers(model, tokenizer, decode, batch_size=8) == expected
    assert answers(model, tokenizer, decode, batch_size=1) == expected
    assert answers(model, tokenizer, decode, batch_size=2) == expected


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"num_beams": 3, "length_penalty": -2.0}, {"repetition_penalty": 3.0}]
)
def test_other_ways_of_decoding_do_not_depend_on_the_batch(family: str, settings: dict, tokenizer) -> None:
    model, decode = tiny_lm(family), DecodeSpec(max_new_tokens=6, **settings)
    greedy = answers(model, tokenizer, DecodeSpec(max_new_tokens=6))
    found = answers(model, tokenizer, decode)
    assert found == answers(model, tokenizer, decode, batch_size=1)
    assert found != greedy


def repeated_pairs(text: str) -> int:
    pairs = list(pairwise(text.split()))
    return len(pairs) - len(set(pairs))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_no_pair_of_words_occurs_twice(family: str, tokenizer) -> None:
    model = tiny_lm(family)
    model.lm_head.register_forward_hook(lambda *call: call[-1].index_fill(-1, torch.tensor([PAD, BOS, TURN]), -1e4))
    plain = answers(model, tokenizer, DecodeSpec(max_new_tokens=15))
    found = answers(model, tokenizer, DecodeSpec(max_new_tokens=15, no_repeat_ngram=2))
    assert max(map(repeated_pairs, plain)) > 0
    assert max(map(repeated_pairs, found)) == 0


def test_drawn_answers_depend_on_the_seed_alone(tokenizer) -> None:
    model, decode = tiny_lm("gpt2"), DecodeSpec(max_new_tokens=8, sample=True, temperature=1.5, top_p=0.95, top_k=20)
    first = answers(model, tokenizer, decode, seed=3)
    torch.manual_seed(11)
    assert answers(model, tokenizer, decode, seed=3) == first
    assert answers(model, tokenizer, decode, seed=4) != first
    cold = DecodeSpec(max_new_tokens=8, sample=True, temperature=1e-4)
    assert answers(model, tokenizer, cold) == answers(model, tokenizer, DecodeSpec(max_new_tokens=8))


def test_an_answer_ends_before_a_stop_text(tokenizer) -> None:
    model = tiny_lm("gpt2")
    plain = answers(model, tokenizer, DecodeSpec(max_new_tokens=8))
    stops = sorted({text.split()[2] for text in plain})[:2]
    found = answers(model, tokenizer, DecodeSpec(max_new_tokens=8, stop=stops))
    assert found == [cut(text, stops) for text in plain]
    assert found != plain


def cut(text: str, stops: list[str]) -> str:
    words = text.split()
    return " ".join(words[: min([words.index(stop) for stop in stops if stop in words], default=None)])


def test_what_stands_in_the_prompt_stops_nothing_and_a_token_can_be_a_stop(tokenizer) -> None:
    model = tiny_lm("gpt2")
    model.lm_head = Scripted(model, [7, 8, TURN, 9])
    assert answers(model, tokenizer, DecodeSpec(max_new_tokens=4, stop=["w5"]), prompts=[[1, 5]]) == ["w7 w8 w9"]
    model.lm_head.step = 0
    assert answers(model, tokenizer, DecodeSpec(max_new_tokens=4, stop=["<turn>"]), prompts=[[1, 5]]) == ["w7 w8"]


def test_nothing_is_written_behind_a_stop(tokenizer) -> None:
    model = tiny_lm("gpt2")
    model.lm_head = Scripted(model, [7, 8, 9, 10])
    assert answers(model, tokenizer, DecodeSpec(max_new_tokens=12, stop=["8 w9"]), prompts=[[1, 5]]) == ["w7 w"]
    assert model.lm_head.step == 3


class Scripted(nn.Module):
    """What a model is told to write, token by token, by way of its logits."""

    def __init__(self, model: nn.Module, script: list[int]) -> None:
        super().__init__()
        self.head, self.script, self.step = model.lm_head, script, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.head(hidden)
        logits[:, -1] = -100.0
        logits[:, -1, self.script[min(self.step, len(self.script) - 1)]] = 100.0
        self.step += 1
        return logits


@pytest.mark.parametrize(
    ("script", "text"),
    [([7, 8, EOS, 9], "w7 w8"), ([7, TURN, 9], "w7"), ([EOS], ""), ([7, PAD, 8], "w7 w8")],
)
def test_an_answer_ends_at_the_end_mark_or_that_of_a_turn(script: list[int], text: str, tokenizer) -> None:
    model = tiny_lm("gpt2")
    model.generation_config.eos_token_id = [TURN]
    model.lm_head = Scripted(model, script)
    assert answers(model, tokenizer, DecodeSpec(max_new_tokens=len(script)), prompts=PROMPTS[:1]) == [text]


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_what_the_checkpoint_would_like_is_not_done(family: str, tokenizer) -> None:
    model, decode = tiny_lm(family), DecodeSpec(max_new_tokens=5)
    expected = answers(model, tokenizer, decode)
    bounds = {"min_new_tokens": 5, "max_length": 7, "suppress_tokens": list(range(10, 39)), "repetition_penalty": 5.0}
    forced = {"forced_bos_token_id": 9, "forced_eos_token_id": EOS, "no_repeat_ngram_size": 1, "eos_token_id": EOS}
    theirs = GenerationConfig(temperature=0.6, top_p=0.9, top_k=5, **bounds, **forced)
    model.generation_config = theirs
    assert answers(model, tokenizer, decode) == expected
    assert model.generation_config is theirs


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 2}, {"sample": True, "temperature": 0.7, "top_p": 0.9}, {"stop": ["w5"]}], ids=str
)
def test_nothing_is_printed(family: str, settings: dict, tokenizer, capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("transformers")
    handler, level, said = logging.Handler(), logger.level, []
    handler.emit = said.append
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        answers(tiny_lm(family), tokenizer, DecodeSpec(max_new_tokens=3, **settings))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert [record.getMessage() for record in said] == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("family", ["gpt2", "opt", "bart"])
def test_all_positions_of_a_model_can_be_used(family: str, tokenizer) -> None:
    model, positions = tiny_lm(family), int(LM_CONFIGS[family].get("n_positions", 24))
    prompt = [1, *[7] * (positions - 9)]
    assert answers(model, tokenizer, DecodeSpec(max_new_tokens=8), prompts=[prompt, [1]])


def test_batches_come_longest_first_and_tell_how_far_they_are(tokenizer) -> None:
    told: list[tuple[int, int]] = []
    found = generate(
        tiny_lm("gpt2").train(),
        [Asked(ids) for ids in PROMPTS],
        DecodeSpec(max_new_tokens=2),
        tokenizer=tokenizer,
        device=open_device(DeviceSpec(name="cpu")),
        batch_size=2,
        progress=lambda done, total: told.append((done, total)),
    )
    assert [number for number, _ in found] == [1, 3, 4, 0, 2]
    assert told == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_tokens_of_an_answer_are_told_without_what_fills_up_its_batch(family: str, tokenizer) -> None:
    model, told = tiny_lm(family), dict[int, list[int]]()
    whole = answers(model, tokenizer, DecodeSpec(max_new_tokens=8), wrote=told.__setitem__)
    stop = whole[0].split()[2]
    stopped = answers(model, tokenizer, DecodeSpec(max_new_tokens=8, stop=[stop]))
    for stops, wanted in (([], whole), ([stop], stopped)):
        answers(model, tokenizer, DecodeSpec(max_new_tokens=8, stop=stops), wrote=told.__setitem__)
        for number, text in enumerate(wanted):
            said = tokenizer.decode(told[number], skip_special_tokens=True)
            assert said.partition(stop if stops else "none")[0].strip() == text
            assert len(told[number]) == 8 or told[number][-1] == EOS or said.strip().endswith(stop)


def test_a_prompt_that_ends_in_the_pad_token_is_no_forgotten_mask(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, warned = tiny_lm("gpt2"), []
    model.config.pad_token_id = EOS

    def note(self: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        warned.append(attention_mask is None and self.config.pad_token_id is not None)

    monkeypatch.setattr(PreTrainedModel, "warn_if_padding_and_no_attention_mask", note)
    answers(model, tokenizer, DecodeSpec(max_new_tokens=2), prompts=[[1, 5, EOS]])
    assert warned
    assert not any(warned)
    assert model.config.pad_token_id == EOS
