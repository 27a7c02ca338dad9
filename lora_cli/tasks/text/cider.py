"""CIDEr-D: agreement with the references, rare n-grams weighing more. Knows texts only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from lora_cli.tasks.metrics import Undefined
from lora_cli.tasks.text.words import Ngram, caption_words, ngram_counts

__all__ = ["cider"]

_ORDER = 4
_SIGMA = 6.0


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    r"""CIDEr-D, 0 to 10 (Vedantam et al. 2015, arXiv:1411.5726), as the E2E challenge's script computes it.

    The mean over texts, over their references and over n = 1..4 of
    10 * e^(-(l(c) - l(s))^2 / (2 * 6^2)) * (min(g(c), g(s)) · g(s)) / (|g(c)| |g(s)|),
    g the vector of tf * idf of all n-grams, l the number of words; idf = log(N / number of texts with the n-gram
    in one of their references), from the N texts that are scored: only scores of the same texts compare.
    The COCO caption code, and papers after it, call this CIDEr; there is no stemming.

    Raises:
        Undefined: there is only one text, so that every idf is 0; or no reference has a word.
    """
    if len(predictions) < 2:
        raise Undefined("one row only: n-grams are weighed by how few of the rows have them")
    made = [caption_words(text) for text in predictions]
    wanted = [[caption_words(text) for text in texts] for texts in references]
    frequencies = Counter[Ngram]()
    for targets in wanted:
        frequencies.update({ngram for target in targets for ngram in ngram_counts(target, _ORDER)})
    if not frequencies:
        raise Undefined("no reference has a word")
    idf = {ngram: math.log(len(made) / times) for ngram, times in frequencies.items()}
    unseen = math.log(len(made))
    total = 0.0
    for words, targets in zip(made, wanted, strict=True):
        vector = _vector(words, idf, unseen)
        similar = [_similarity(vector, _vector(target, idf, unseen)) for target in targets]
        nearness = [math.exp(-((len(words) - len(target)) ** 2) / (2 * _SIGMA**2)) for target in targets]
        total += sum(map(float.__mul__, similar, nearness)) / len(targets)
    return 10 * total / len(made)


_Vector = tuple[dict[Ngram, float], list[float]]
"""Weight of each n-gram, and the norm of the weights of each order."""


def _vector(words: Sequence[str], idf: dict[Ngram, float], unseen: float) -> _Vector:
    weights = {ngram: times * idf.get(ngram, unseen) for ngram, times in ngram_counts(words, _ORDER).items()}
    squares = [0.0] * _ORDER
    for ngram, weight in weights.items():
        squares[len(ngram) - 1] += weight**2
    return weights, [math.sqrt(square) for square in squares]


def _similarity(made: _Vector, wanted: _Vector) -> float:
    """Mean over the orders of the clipped cosine."""
    products = [0.0] * _ORDER
    for ngram, weight in made[0].items():
        target = wanted[0].get(ngram, 0.0)
        products[len(ngram) - 1] += min(weight, target) * target
    norms = zip(products, made[1], wanted[1], strict=True)
    return sum(product / (a * b) for product, a, b in norms if product) / _ORDER
