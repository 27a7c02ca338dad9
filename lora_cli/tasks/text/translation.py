"""BLEU and chrF by sacreBLEU, so that they compare with what papers report. Knows texts and sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

__all__ = ["bleu", "chrf"]


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    r"""Corpus BLEU, 0 to 100 (Papineni et al. 2002, P02-1040; Post 2018, arXiv:1804.08771).

    BLEU = min(1, e^(1 - r/c)) * exp(mean over n = 1..4 of log p_n), p_n the n-grams also found in a reference
    (each as often as in the reference that has it most) among all n-grams, c the number of words, r the
    sum of the references' lengths, for each text the one closest to its own.

    sacreBLEU's defaults: tokenizer 13a, case kept, exponential smoothing.
    """
    from sacrebleu.metrics.bleu import BLEU

    # force: outputs that look tokenised are scored as they are, without a warning.
    return _corpus_score(BLEU(force=True), predictions, references)


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """chrF2, 0 to 100: F-score, recall counted double, of character 1- to 6-grams (Popović 2015, W15-3049)."""
    from sacrebleu.metrics.chrf import CHRF

    return _corpus_score(CHRF(), predictions, references)


def _corpus_score(metric: Any, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    # sacreBLEU wants the first references of all texts, then the second ones, …; None where a text has fewer.
    streams = [list(stream) for stream in zip_longest(*references)]
    return float(metric.corpus_score(list(predictions), streams).score)
