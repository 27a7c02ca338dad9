"""From prompts and answers to token ids, with what is learnt marked. Knows a tokenizer, nothing of rows or models."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from lora_cli.errors import ConfigError, ModelError
from lora_cli.late_logits import LateLogits
from lora_cli.tasks.encoding import AT_ONCE, Encoded, padded
from lora_cli.tasks.prompts import Prompt

if TYPE_CHECKING:
    import torch

Logits = TypeVar("Logits", "torch.Tensor", LateLogits)

__all__ = ["IGNORED", "EncodedTexts", "Query", "TextExample", "Writer", "collate", "learnt"]

IGNORED = -100
"""Label of a position that is not learnt. Positions are masked by place: a pad or end mark inside a text is a token."""
_STAND_INS = 0x10F000
"""First of the characters, of a plane for private use, that stand for a special token's text in a conversation."""
_CHARACTERS_PER_TOKEN = 50
"""Cells beyond this many characters per token that fits are dropped before tokenizing, and counted as truncated."""


@dataclass(frozen=True)
class TextExample:
    """One text as the model reads it and what it has to write.

    Of a decoder, `labels` stand beside `input_ids`, IGNORED where nothing is learnt. Of an encoder-decoder,
    `labels` are the decoder's text, as long as that is.
    """

    index: int
    """Position among the examples of the split."""
    input_ids: list[int]
    labels: list[int]
    decoder_start: int | None = None
    """The token that starts an encoder-decoder's answer; None: a decoder."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads."""
        return len(self.input_ids) + (len(self.labels) if self.decoder_start is not None else 0)

    @property
    def num_targets(self) -> int:
        """Tokens that it has to predict."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class Query:
    """One distinct prompt, to be answered once and scored against all its references."""

    index: int
    """Position among the queries of the split."""
    text: str
    input_ids: list[int]
    references: list[str] = field(default_factory=list)
    group: str | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.input_ids)


@dataclass(frozen=True)
class EncodedTexts(Encoded):
    """A split's examples and queries, and what happened on the way."""

    queries: list[Query] = field(default_factory=list)
    num_cut_targets: int = 0
    """Examples whose answer was cut."""


class Writer:
    """A tokenizer with what it takes to write: how a prompt begins and ends, and the mark that ends an answer.

    `decoder_start` is the model's, None for a decoder. What stands in a text is text: only this class adds special
    tokens, except in a chat template, which is made of them.

    Raises:
        ModelError: the tokenizer is a slow one, or has no end mark.
    """

    def __init__(self, tokenizer: Any, decoder_start: int | None) -> None:
        if not tokenizer.is_fast:
            raise ModelError(f"{type(tokenizer).__name__}: only fast tokenizers (tokenizer.json) can be used")
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{type(tokenizer).__name__}: has no end mark (eos_token), so no answer could end")
        self.tokenizer, self.decoder_start, self.eos = tokenizer, decoder_start, int(tokenizer.eos_token_id)
        self.max_length = int(tokenizer.model_max_length)
        bare, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
        start = next(k for k in range(len(whole)) if whole[k : k + len(bare)] == bare)
        self.before, self._after = whole[:start], whole[start + len(bare) :]
        self._first = self.eos if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
        special = {text.content: id_ for id_, text in tokenizer.added_tokens_decoder.items() if text.special}
        self._stand_ins = {text: chr(_STAND_INS + number) for number, text in enumerate(special)}
        self._letters = {
            id_: list(filter(None, tokenizer.convert_tokens_to_ids(list(text))))
            for text, id_ in special.items()
            if id_ != tokenizer.unk_token_id
        }

    def budget(self, max_length: int, answers: Mapping[str, int]) -> int:
        """Tokens that a prompt may have beside the longest answer; `answers` are its possible lengths by config key.

        Raises:
            ConfigError: the model's positions leave no room for both.
        """
        key, longest = max(answers.items(), key=lambda item: item[1])
        # An encoder-decoder counts the positions of its answer for themselves.
        reserved = len(self.before) + 2 if self.decoder_start is None else 0
        if longest + reserved > self.max_length:
            raise ConfigError(
                key, longest, f"at most {self.max_length - reserved}: the model has {self.max_length} positions"
            )
        return min(max_length, self.max_length - (longest if self.decoder_start is None else 0))

    def prompts(self, prompts: Sequence[Prompt], budget: int, side: str) -> tuple[list[list[int]], list[bool]]:
        """(token ids, whether it was cut) of each prompt: its longest cell is cut at `side`, the template last."""
        # What follows a text of an encoder would end a decoder's before its answer.
        after = self._after if self.decoder_start is not None else []
        before = self.before
        found, cuts = [], []
        for prompt, shorter, ids, offsets in self._read(prompts, budget * _CHARACTERS_PER_TOKEN, side):
            end = [self.eos, *after] if prompt.ends and self.eos not in after else after
            kept = _fitted(offsets, shorter.cells, budget - len(before) - len(end), side)
            # An answer has to follow something.
            found.append([*before, *(ids[position] for position in kept), *end] or [self._first])
            cuts.append(len(kept) < len(ids) or shorter is not prompt)
        return found, cuts

    def targets(self, texts: Sequence[str], most: int) -> tuple[list[list[int]], list[bool]]:
        """(token ids, whether it was cut) of each answer: at most `most`, the last one always the end mark."""
        limit = most * _CHARACTERS_PER_TOKEN
        encoded = self._tokenized([text[:limit] for text in texts])["input_ids"]
        # BART's answers begin as its texts do.
        before = self.before if self.decoder_start is not None else []
        room = most - len(before) - 1
        ids = [[*before, *found[:room], self.eos] for found in encoded]
        return ids, [len(found) > room or len(text) > limit for found, text in zip(encoded, texts, strict=True)]

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with the mark that begins a text, if the model has one, and the one that ends it."""
        return [[*self.before, *ids, self.eos] for ids in self._tokenized(texts)["input_ids"]]

    def guarded(self, text: str) -> str:
        """What somebody wrote, for a chat template: one character stands for what would read as a special token."""
        return _replaced(text, self._stand_ins)

    def unguarded(self, text: str) -> str:
        """The inverse of `guarded`."""
        return _replaced(text, {character: special for special, character in self._stand_ins.items()})

    def rendered(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts from a chat template: special tokens in them are meant, guarded ones are text."""
        marks = "".join(self._stand_ins.values())
        # In turn a part of the template, to be read with its special tokens, and a guarded one (or none).
        parted = [re.split(f"([{marks}]+)", text) if marks else [text] for text in texts]
        meant = self.tokenizer(
            [part for parts in parted for part in parts[::2]],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        plain = self._tokenized([self.unguarded(part) for parts in parted for part in parts[1::2]])["input_ids"]
        sources = iter(meant), iter(plain)
        return [[token for number in range(len(parts)) for token in next(sources[number % 2])] for parts in parted]

    def _read(self, prompts: Sequence[Prompt], limit: int, side: str) -> Iterator[tuple[Prompt, Prompt, Any, Any]]:
        """(prompt, with its cells cut to `limit` characters, its token ids, their places in the text) of each."""
        for start in range(0, len(prompts), AT_ONCE):
            part = prompts[start : start + AT_ONCE]
            clipped = [_clipped(prompt, limit, side) for prompt in part]
            encoded = self._tokenized([prompt.text for prompt in clipped], offsets=True)
            yield from zip(part, clipped, encoded["input_ids"], encoded["offset_mapping"], strict=True)

    def _tokenized(self, texts: Sequence[str], *, offsets: bool = False) -> Any:
        if not texts:
            return {"input_ids": [], "offset_mapping": []}
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_offsets_mapping=offsets,
            # It would complain of long texts, which are cut here.
            verbose=False,
        )
        for row, ids in enumerate(encoded["input_ids"]):
            # Special tokens are words to T5's model too, and found in a text: they are spelled out instead.
            if not self._letters.keys().isdisjoint(ids):
                spelled = [self._letters.get(token, [token]) for token in ids]
                encoded["input_ids"][row] = [token for tokens in spelled for token in tokens]
                if offsets:
                    spans = zip(spelled, encoded["offset_mapping"][row], strict=True)
                    encoded["offset_mapping"][row] = [span for tokens, span in spans for _ in tokens]
        return encoded


def collate(examples: Sequence[TextExample], pad: int) -> dict[str, torch.Tensor]:
    """One batch, padded on the right.

    Shapes: input_ids, attention_mask (N, longest); labels the same, or, of an encoder-decoder, with
    decoder_input_ids (N, longest answer): the labels shifted right behind the start token.
    """
    labels = [example.labels for example in examples]
    batch = {
        "input_ids": padded([example.input_ids for example in examples], pad),
        "attention_mask": padded([[1] * len(example.input_ids) for example in examples], 0),
        "labels": padded(labels, IGNORED),
    }
    if examples[0].decoder_start is not None:
        start = examples[0].decoder_start
        batch["decoder_input_ids"] = padded([[start, *ids[:-1]] for ids in labels], pad)
    return batch


def learnt(logits: Logits, batch: Mapping[str, torch.Tensor]) -> tuple[Logits, torch.Tensor]:
    """(logits, labels) of the targets of a batch, row by row.

    Shapes: logits (N, T, vocabulary), or already (targets, vocabulary) → (targets, vocabulary) and (targets,).
    """
    labels = batch["labels"]
    if logits.ndim == 2:
        return logits, labels[:, 1:][labels[:, 1:] != IGNORED]
    if "decoder_input_ids" not in batch:
        # A decoder's token predicts the next one; an encoder-decoder's inputs are shifted already.
        logits, labels = logits[:, :-1], labels[:, 1:]
    chosen = labels != IGNORED
    return logits[chosen], labels[chosen]


def _replaced(text: str, table: Mapping[str, str]) -> str:
    # The longest first: one special token's text may begin with another's.
    pattern = "|".join(map(re.escape, sorted(table, key=len, reverse=True)))
    return re.sub(pattern, lambda match: table[match[0]], text) if pattern else text


def _clipped(prompt: Prompt, limit: int, side: str) -> Prompt:
    """The prompt with every cell cut to `limit` characters: the tokenizer would else lay out all of it."""
    if all(end - start <= limit for start, end in prompt.cells):
        return prompt
    text, cells, last = "", [], 0
    for start, end in prompt.cells:
        cell = prompt.text[start:end]
        text += prompt.text[last:start]
        cells.append((len(text), len(text) + min(limit, len(cell))))
        text += cell[:limit] if side == "right" else cell[-limit:]
        last = end
    return Prompt(text + prompt.text[last:], tuple(cells))


def _fitted(offsets: Sequence[tuple[int, int]], cells: Sequence[tuple[int, int]], budget: int, side: str) -> list[int]:
    """Positions of the tokens to keep: of the longest cell, then the next, as many go at `side` as are too many."""
    excess, dropped = len(offsets) - budget, set[int]()
    if excess <= 0:
        return list(range(len(offsets)))
    inside = [[i for i, (start, end) in enumerate(offsets) if first <= start and end <= last] for first, last in cells]
    for positions in sorted(inside, key=len, reverse=True):
        drop = min(excess - len(dropped), len(positions))
        dropped.update(positions[len(positions) - drop :] if side == "right" else positions[:drop])
    kept = [position for position in range(len(offsets)) if position not in dropped]
    # A template longer than the budget: nothing is left but to cut it as well.
    if len(kept) > max(budget, 0):
        kept = kept[: max(budget, 0)] if side == "right" else kept[len(kept) - max(budget, 0) :]
    return kept
