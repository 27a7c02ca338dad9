"""METEOR without its word lists: words match by their stems, synonyms do not. Knows texts only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from lora_cli.tasks.metrics import Undefined
from lora_cli.tasks.text.porter import stem
from lora_cli.tasks.text.words import caption_words

__all__ = ["meteor_exact_stem"]

_BEAM = 64
"""Partial alignments kept: only a text with many repeated words has more."""


class _Matches(NamedTuple):
    """What one text shares with one reference."""

    matches: int
    chunks: int
    num_words: int
    num_target: int

    @property
    def score(self) -> float:
        if not self.matches:
            return 0.0
        precision, recall = self.matches / self.num_words, self.matches / self.num_target
        mean = 10 * precision * recall / (recall + 9 * precision)
        return mean * (1 - 0.5 * (self.chunks / self.matches) ** 3)


def meteor_exact_stem(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    r"""METEOR with its modules exact and porter-stem, 0 to 100 (Banerjee and Lavie 2005, W05-0909).

    10 P R / (R + 9 P) * (1 - 0.5 (chunks / matches)^3), of the alignment with the most matches and, of these, the
    fewest chunks (runs of words in the same order on both sides). Each text counts with the reference that suits
    it best, of equally good ones the shorter; matches, chunks and words are summed over the corpus before the
    formula, as the paper does for a system's score.

    A subset, and named so: WordNet's synonyms, paraphrases and the tuned weights of METEOR 1.5 are missing, so
    this compares with itself and not with published METEOR. Words are those of the COCO caption scripts.

    Raises:
        Undefined: no reference has a word.
    """
    sums = [0, 0, 0, 0]
    words_seen = False
    for prediction, texts in zip(predictions, references, strict=True):
        words = [stem(word) for word in caption_words(prediction)]
        targets = [[stem(word) for word in caption_words(text)] for text in texts]
        words_seen = words_seen or any(targets)
        best = max((_matches(words, target) for target in targets), key=_better)
        sums = [total + part for total, part in zip(sums, best, strict=True)]
    if not words_seen:
        raise Undefined("no reference has a word")
    return 100 * _Matches(*sums).score


def _better(found: _Matches) -> tuple[float, int, _Matches]:
    """Of equally good references the shorter, so that their order does not matter to the sums."""
    return found.score, -found.num_target, found


def _matches(words: Sequence[str], target: Sequence[str]) -> _Matches:
    # Equal words have equal stems, so that matching stems alone finds as many matches as exact first, stems next.
    matches = (Counter(words) & Counter(target)).total()
    return _Matches(matches, _fewest_chunks(words, target) if matches else 0, len(words), len(target))


def _fewest_chunks(words: Sequence[str], target: Sequence[str]) -> int:
    """Chunks of the best alignment with all matches there can be, word by word of `words`.

    A state is (the target's words used, as bits; the one the word before was matched with).
    """
    places: dict[str, list[int]] = {}
    for position, word in enumerate(target):
        places.setdefault(word, []).append(position)
    surplus = Counter(words) - Counter(target)
    seen: Counter[str] = Counter()
    states = {(0, -2): 0}
    for word in words:
        spots = places.get(word, [])
        grown: dict[tuple[int, int], int] = {}
        for (used, last), chunks in states.items():
            num_matched = 0
            for spot in spots:
                if used >> spot & 1:
                    num_matched += 1
                else:
                    state, count = (used | 1 << spot, spot), chunks + (spot != last + 1)
                    grown[state] = min(count, grown.get(state, count))
            if seen[word] - num_matched < surplus[word]:
                grown[used, -2] = min(chunks, grown.get((used, -2), chunks))
        seen[word] += 1
        states = grown if len(grown) <= _BEAM else dict(sorted(grown.items(), key=_chunks_first)[:_BEAM])
    return min(states.values())


def _chunks_first(item: tuple[tuple[int, int], int]) -> tuple[int, tuple[int, int]]:
    state, chunks = item
    return chunks, state
