"""How each family of measures sees a text as words. Knows text only."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lora_cli.tasks.text.porter import stem

__all__ = ["Ngram", "caption_words", "mteval_words", "ngram_counts", "rouge_words"]

Ngram = tuple[str, ...]

_ASCII_LOWER = str.maketrans({chr(code): chr(code + 32) for code in range(ord("A"), ord("Z") + 1)})
_ROUGE_WORD = re.compile(r"[a-z0-9]+")
_CAPTION_WORD = re.compile(
    r"""
      can(?=not\b)                                      # cannot → can not
    | \w+(?=n't\b)                                      # doesn't → does n't
    | n't\b | '(?:s|re|ve|ll|d|m)\b                     # and the second halves
    | (?:[^\W\d_]\.){2,}                                # u.s., a.m.
    | (?:mr|mrs|ms|dr|st|jr|sr|co|inc|no|vs|[^\W\d_])\.(?=\s+[\w"'(])
    | \w+(?:(?:[-./&]|'(?!(?:s|re|ve|ll|d|m)\b)|(?<=\d)[,:](?=\d))\w+)*
    | [^\w\s]
    """,
    re.VERBOSE,
)
_CAPTION_DROPPED = frozenset("'\"`.?!,:-;–—“”‘’…")


def mteval_words(text: str) -> list[str]:
    """Words as NIST's mteval-v13a has them without -c: tokenizer 13a, A–Z (no other letters) in lower case."""
    return str(_tokenizer_13a()(" ".join(text.translate(_ASCII_LOWER).split()))).split()


@functools.cache
def _tokenizer_13a() -> Callable[[str], Any]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()  # type: ignore[no-untyped-call, no-any-return, unused-ignore]


def rouge_words(text: str) -> list[str]:
    """Words as rouge-score has them with its stemmer: runs of a–z and 0–9, those over three letters stemmed."""
    return [stem(word) if len(word) > 3 else word for word in _ROUGE_WORD.findall(text.lower())]


def caption_words(text: str) -> list[str]:
    """Words as the COCO caption scripts have them: Penn Treebank tokens in lower case, without punctuation.

    The scripts run Stanford's tokenizer (CoreNLP 3.4.1). This is an approximation by one expression, which gives
    the same words for 99.9 % of the E2E references and 97 to 99 % of WebNLG's, DART's and SAMSum's.
    """
    words = _CAPTION_WORD.findall(text.lower().replace("’", "'"))
    return [word for word in words if word not in _CAPTION_DROPPED]


def ngram_counts(words: Sequence[str], longest: int) -> Counter[Ngram]:
    """How often each n-gram of 1 to `longest` words occurs."""
    return Counter(
        tuple(words[start : start + n]) for n in range(1, longest + 1) for start in range(len(words) - n + 1)
    )
