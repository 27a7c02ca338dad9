"""ROUGE: the references' words, pairs and sequences that a text has too. Knows texts only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from lora_cli.tasks.metrics import Undefined
from lora_cli.tasks.text.words import caption_words, ngram_counts, rouge_words

__all__ = ["e2e_rouge_l", "rouge_1", "rouge_2", "rouge_l", "rouge_lsum"]

Words = Sequence[str]
_Seen = TypeVar("_Seen")
_BETA = 1.2


def rouge_1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    r"""ROUGE-1, 0 to 100: F1 of the words a text shares with its reference (Lin 2004, W04-1013, section 2).

    As rouge-score has it, with stemming: runs of a–z and 0–9 in lower case; of several references the one with
    the highest F1; the mean over the texts.

    Raises:
        Undefined: no reference has a letter a–z or a digit, so this tokenizer sees no word at all.
    """
    return _mean_best(predictions, references, rouge_words, lambda words, target: _ngram_f1(words, target, 1))


def rouge_2(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-2, 0 to 100: as `rouge_1`, of pairs of neighbouring words."""
    return _mean_best(predictions, references, rouge_words, lambda words, target: _ngram_f1(words, target, 2))


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L, 0 to 100: as `rouge_1`, of the longest common subsequence (Lin 2004, section 3.1)."""
    return _mean_best(
        predictions,
        references,
        rouge_words,
        lambda words, target: _f1(_lcs_length(words, target), len(words), len(target)),
    )


def rouge_lsum(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-Lsum, 0 to 100: as `rouge_l`, of the union of each reference sentence's longest common subsequences.

    Lin 2004, section 3.2, with rouge-score's clipping of words counted twice. A line is a sentence.
    """
    return _mean_best(predictions, references, _sentences, _summary_f1)


def e2e_rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    r"""ROUGE-L, 0 to 100, as the E2E challenge's script reports it (times 100), by the COCO caption code.

    F = (1 + 1.2^2) P R / (R + 1.2^2 P), P and R of the longest common subsequence, each from whichever reference
    gives the highest, no stemming; the mean over the texts. Published E2E figures are this one.

    Raises:
        Undefined: no reference has a word.
    """
    total = 0.0
    words_seen = False
    for prediction, texts in zip(predictions, references, strict=True):
        words, targets = caption_words(prediction), [caption_words(text) for text in texts]
        words_seen = words_seen or any(targets)
        lengths = [_lcs_length(words, target) for target in targets]
        if any(lengths):
            precision = max(lengths) / len(words)
            recall = max(length / max(len(target), 1) for length, target in zip(lengths, targets, strict=True))
            total += (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)
    if not words_seen:
        raise Undefined("no reference has a word")
    return 100 * total / len(predictions)


def _mean_best(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    read: Callable[[str], _Seen],
    f1: Callable[[_Seen, _Seen], float],
) -> float:
    total = 0.0
    words_seen = False
    for prediction, texts in zip(predictions, references, strict=True):
        words, targets = read(prediction), [read(text) for text in texts]
        words_seen = words_seen or any(targets)
        total += max(f1(words, target) for target in targets)
    if not words_seen:
        raise Undefined("no reference has a letter a-z or a digit")
    return 100 * total / len(predictions)


def _sentences(text: str) -> list[list[str]]:
    return [words for words in map(rouge_words, text.split("\n")) if words]


def _f1(hits: int, num_words: int, num_target: int) -> float:
    return 2 * hits / (num_words + num_target) if hits else 0.0


def _ngram_f1(words: Words, target: Words, n: int) -> float:
    made, wanted = (
        Counter({ngram: times for ngram, times in ngram_counts(side, n).items() if len(ngram) == n})
        for side in (words, target)
    )
    return _f1((made & wanted).total(), made.total(), wanted.total())


def _summary_f1(made: Sequence[Words], wanted: Sequence[Words]) -> float:
    left_made = Counter(word for sentence in made for word in sentence)
    left_wanted = Counter(word for sentence in wanted for word in sentence)
    num_words, num_target = left_made.total(), left_wanted.total()
    hits = 0
    for target in wanted:
        for position in sorted(set().union(*(_lcs_positions(target, words) for words in made))):
            word = target[position]
            if left_made[word] and left_wanted[word]:
                left_made[word] -= 1
                left_wanted[word] -= 1
                hits += 1
    return _f1(hits, num_words, num_target)


def _lcs_length(words: Words, target: Words) -> int:
    """Length of the longest common subsequence, one bit per word of `words` (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for position, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << position
    row = full = (1 << len(words)) - 1
    for word in target:
        common = row & places.get(word, 0)
        row = (row + common | row - common) & full
    return len(words) - row.bit_count()


def _lcs_positions(target: Words, words: Words) -> set[int]:
    """Positions in `target` of one longest common subsequence; of several, rouge-score's."""
    table = [[0] * (len(words) + 1)]
    for wanted in target:
        above, row = table[-1], [0]
        for column, word in enumerate(words):
            row.append(above[column] + 1 if word == wanted else max(above[column + 1], row[column]))
        table.append(row)
    positions = set()
    i, j = len(target), len(words)
    while i and j:
        if target[i - 1] == words[j - 1]:
            i, j = i - 1, j - 1
            positions.add(i)
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return positions
