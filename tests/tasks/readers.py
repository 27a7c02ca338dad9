"""Tokenizers like those of GPT-2, OPT, LLaMA, T5 and BART, small enough to be built in a test."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_cli.tasks.rows import Rows

DECODERS = ("gpt2", "opt", "llama")
READERS = (*DECODERS, "t5", "bart")
_PAIRS = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n")]
_BEGINS_AND_ENDS = {"bos_token": "<s>", "eos_token": "</s>"}


@dataclass(frozen=True)
class Reader:
    """What a task has to know of a model."""

    tokenizer: Any
    decoder_start: int | None = None

    @property
    def eos(self) -> int:
        return int(self.tokenizer.eos_token_id)


def reader_like(family: str, *, max_length: int = 10_000, special: tuple[str, ...] = ()) -> Reader:
    """A reader of `family`, with further `special` tokens; of encoder-decoders 0 starts an answer."""
    tokenizer = _BUILDERS[family]()
    tokenizer.model_max_length = max_length
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return Reader(tokenizer, None if family in DECODERS else 0)


def rows_of(*rows: dict[str, Any]) -> Rows:
    return Rows(list(rows), source="data.jsonl", separator=":")


def _gpt2() -> PreTrainedTokenizerFast:
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=_bytes([end]), bos_token=end, eos_token=end, pad_token=end)


def _opt() -> PreTrainedTokenizerFast:
    core = _bytes(["<pad>", "</s>"])
    core.post_processor = _around(core, "</s> $A")
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="</s>", eos_token="</s>", pad_token="<pad>")


def _bart() -> PreTrainedTokenizerFast:
    core = _bytes(["<s>", "<pad>", "</s>"])
    core.post_processor = _around(core, "<s> $A </s>")
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", **_BEGINS_AND_ENDS)


def _llama() -> PreTrainedTokenizerFast:
    """Pads with its end mark, as what `load_tokenizer` gives does."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.printable[:94]]
    merges = [*_PAIRS, ("▁", "the")]
    core = Tokenizer(
        models.BPE(_numbered([*tokens, *map("".join, merges)]), merges, unk_token="<unk>", byte_fallback=True)
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    core.post_processor = _around(core, "<s> $A")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="</s>", **_BEGINS_AND_ENDS)


def _t5() -> PreTrainedTokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁the", -3.0)]
    core = Tokenizer(models.Unigram([*pieces, *((letter, -4.0) for letter in string.printable[:94])], unk_id=2))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.post_processor = _around(core, "$A </s>")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


_BUILDERS = {"gpt2": _gpt2, "opt": _opt, "llama": _llama, "t5": _t5, "bart": _bart}


def _bytes(special: list[str]) -> Tokenizer:
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, _PAIRS)]
    core = Tokenizer(models.BPE(_numbered(tokens), _PAIRS))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core


def _around(core: Tokenizer, template: str) -> processors.TemplateProcessing:
    marks = [word for word in template.split() if word != "$A"]
    return processors.TemplateProcessing(
        single=template, special_tokens=[(mark, core.token_to_id(mark)) for mark in marks]
    )


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}
