"""BLEU and NIST as NIST's mteval-v13a.pl computes them, the script of the E2E challenge. Knows texts only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_cli.tasks.metrics import Undefined
from lora_cli.tasks.text.words import Ngram, mteval_words, ngram_counts

__all__ = ["e2e_bleu", "nist"]

_BLEU_ORDER = 4
_NIST_ORDER = 5
_BETA = math.log(0.5) / math.log(1.5) ** 2
"""Makes the length penalty one half for a text of two thirds of the references' length."""


def e2e_bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    r"""BLEU, 0 to 100, as measure_scores.py of the E2E challenge reports it (times 100), by mteval-v13a.pl.

    BLEU = e^min(0, 1 - r/c) * exp(1/4 * sum over n = 1..4 of log p_n) (Papineni et al. 2002, P02-1040).
    It differs from `bleu` in that A–Z are put in lower case and in two corner cases: without any match the
    score is smoothed too (the k-th p_n of 0 becomes 1 / (2^k * number of n-grams)), and an order for which all
    texts are too short counts as p_n = 1. r is summed from the closest references, the shorter of two equally
    close; blank references beside others are passed over, as by the script.
    """
    found, made = Counter[int](), Counter[int]()
    length = 0
    for row in _rows(predictions, references, _BLEU_ORDER):
        found.update(_by_order(row.matches))
        made.update(_by_order(row.prediction))
        length += min(row.lengths, key=lambda words: (abs(words - row.num_words), words))
    if not made[1]:
        return 0.0
    total, smoothing = min(0.0, 1 - length / made[1]), 1
    for n in range(1, _BLEU_ORDER + 1):
        if not made[n]:
            continue
        if not found[n]:
            smoothing *= 2
        total += math.log((found[n] or 1 / smoothing) / made[n]) / _BLEU_ORDER
    return 100 * math.exp(total)


def nist(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    r"""NIST-5, from 0, without an upper bound (Doddington 2002), as mteval-v13a.pl.

    NIST = sum over n = 1..5 of (sum of info(w_1..w_n) over matched n-grams / number of n-grams)
    * exp(beta * log^2 min(1, c / r)), with info(w_1..w_n) = log2(count(w_1..w_(n-1)) / count(w_1..w_n)) in the
    references. r is the words of all references over the mean number of references, as in the script, which
    with uneven numbers of references is not the mean of the means.

    Raises:
        Undefined: no reference has a word.
    """
    rows = list(_rows(predictions, references, _NIST_ORDER))
    num_reference_words = sum(sum(row.lengths) for row in rows)
    if not num_reference_words:
        raise Undefined("no reference has a word")
    counts = Counter[Ngram]()
    for row in rows:
        for reference in row.references:
            counts.update(reference)
    counts[()] = num_reference_words
    made = Counter[int]()
    gained = dict.fromkeys(range(1, _NIST_ORDER + 1), 0.0)
    for row in rows:
        made.update(_by_order(row.prediction))
        for ngram, times in row.matches.items():
            gained[len(ngram)] += times * math.log2(counts[ngram[:-1]] / counts[ngram])
    score = sum(gain / max(made[n], 1) for n, gain in gained.items())
    num_references = sum(sum(words > 0 for words in row.lengths) for row in rows)
    ratio = made[1] / (num_reference_words / (num_references / len(rows)))
    return score * math.exp(_BETA * math.log(min(1.0, ratio)) ** 2) if ratio else 0.0


@dataclass(frozen=True)
class _Row:
    """Counts of one text and of its references."""

    prediction: Counter[Ngram]
    references: list[Counter[Ngram]]
    matches: dict[Ngram, int]
    num_words: int
    lengths: list[int]


def _rows(predictions: Sequence[str], references: Sequence[Sequence[str]], order: int) -> Iterable[_Row]:
    for prediction, texts in zip(predictions, references, strict=True):
        words = mteval_words(prediction)
        all_targets = [mteval_words(text) for text in texts]
        targets = [target for target in all_targets if target] or all_targets[:1]
        made = ngram_counts(words, order)
        counted = [ngram_counts(target, order) for target in targets]
        most = Counter[Ngram]()
        for counts in counted:
            most |= counts
        yield _Row(made, counted, made & most, len(words), [len(target) for target in targets])


def _by_order(counts: dict[Ngram, int]) -> Counter[int]:
    orders = Counter[int]()
    for ngram, times in counts.items():
        orders[len(ngram)] += times
    return orders
