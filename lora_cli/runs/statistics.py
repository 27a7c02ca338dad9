"""Whether one configuration is better than another, or only luckier. Numbers in, numbers out.

Rows are drawn again by Poisson's bootstrap: each row gets a weight drawn from Poisson(1) (Hanley and MacGibbon 2006),
which for many rows is Efron's (1979) drawing with replacement, and lets a metric of thousands of draws be one product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RESAMPLED", "Answers", "interval", "mcnemar", "paired_bootstrap", "resampled"]

Array = NDArray[Any]
_DRAWS = 2000
_AT_ONCE = 1 << 24
"""Weights in memory at a time."""


@dataclass(frozen=True, eq=False)
class Answers:
    """Predictions for the rows of a split, in their order: ids of labels, or values."""

    references: Array
    predictions: Array


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Student's confidence interval of the mean of `values`; None of fewer than two."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def mcnemar(ours: Answers, theirs: Answers) -> float:
    """McNemar's exact test (1947): p of so uneven a split of the rows that one of two gets right, if both were as good.

    Two-sided.
    """
    from scipy.stats import binomtest

    right, other = ours.predictions == ours.references, theirs.predictions == theirs.references
    only_ours, only_theirs = int((right & ~other).sum()), int((~right & other).sum())
    discordant = only_ours + only_theirs
    return float(binomtest(only_ours, discordant).pvalue) if discordant else 1.0


def paired_bootstrap(metric: str, ours: Sequence[Answers], theirs: Sequence[Answers], *, paired: bool) -> float:
    """p of the difference of two configurations' mean `metric`, two-sided, over rows and seeds drawn again.

    One of `Answers` for each seed, all of the same rows. `paired`: both have the same seeds, in the same order, and
    these are drawn together. The same arguments give the same p.
    """
    draws = np.random.default_rng(0)
    first, second = resampled(metric, ours), resampled(metric, theirs)

    def seeds(count: int) -> Array:
        return draws.integers(count, size=(count, _DRAWS))

    of_ours = seeds(len(ours))
    of_theirs = of_ours if paired else seeds(len(theirs))
    columns = np.arange(_DRAWS)
    differences = first[of_ours, columns].mean(axis=0) - second[of_theirs, columns].mean(axis=0)
    differences = differences[np.isfinite(differences)]
    # No difference counts for either side by half: with few rows it is not rare.
    below, above, none = (float(found.sum()) for found in (differences < 0, differences > 0, differences == 0))
    return min(1.0, 2 * (min(below, above) + none / 2 + 1) / (len(differences) + 1))


def resampled(metric: str, answers: Sequence[Answers]) -> Array:
    """`metric` of each of `answers` over rows drawn again and again, the same for all: [answers, draws].

    NaN where it has no value. Spearman's ranks are those among all rows.
    """
    size = len(answers[0].references)
    draws = np.random.default_rng(1)
    step = max(1, _AT_ONCE // max(size, 1))
    found = np.empty((len(answers), _DRAWS))
    sums = [RESAMPLED[metric](each) for each in answers]
    for begin in range(0, _DRAWS, step):
        end = min(begin + step, _DRAWS)
        weights = draws.poisson(1.0, size=(end - begin, size)).astype(np.float64)
        with np.errstate(all="ignore"):
            for number, (rows, of_sums) in enumerate(sums):
                found[number, begin:end] = of_sums(weights @ rows)
    return found


def _accuracy(answers: Answers) -> Any:
    right = (answers.references == answers.predictions).astype(float)
    return np.stack([right, np.ones_like(right)], axis=1), lambda sums: sums[:, 0] / sums[:, 1]


def _counts(answers: Answers) -> tuple[Array, int]:
    """[rows, 3 · labels]: whether a row is of each label and found, is of it, is said to be."""
    labels = int(max(answers.references.max(), answers.predictions.max())) + 1
    true, said = (np.eye(labels)[ids.astype(int)] for ids in (answers.references, answers.predictions))
    return np.concatenate([true * said, true, said], axis=1), labels


def _f1(answers: Answers) -> Any:
    hit = answers.references * answers.predictions
    rows = np.stack([hit, answers.references, answers.predictions], axis=1).astype(float)
    return rows, lambda sums: 2 * sums[:, 0] / (sums[:, 1] + sums[:, 2])


def _macro_f1(answers: Answers) -> Any:
    rows, labels = _counts(answers)

    def mean(sums: Array) -> Array:
        found, true, said = np.split(sums, [labels, 2 * labels], axis=1)
        values: Array = np.nanmean(np.where(true + said > 0, 2 * found / (true + said), np.nan), axis=1)
        return values

    return rows, mean


def _matthews(answers: Answers) -> Any:
    """Gorodkin's (2004) for any number of labels; 0 where all predictions are the same."""
    rows, labels = _counts(answers)

    def coefficient(sums: Array) -> Array:
        found, true, said = np.split(sums, [labels, 2 * labels], axis=1)
        total = true.sum(axis=1)
        spread_true, spread_said = (total**2 - (each**2).sum(axis=1) for each in (true, said))
        values: Array = (found.sum(axis=1) * total - (true * said).sum(axis=1)) / np.sqrt(spread_true * spread_said)
        return np.where((spread_said == 0) & (spread_true > 0), 0.0, values)

    return rows, coefficient


def _pearson(answers: Answers) -> Any:
    return _correlation(answers.references, answers.predictions)


def _spearman(answers: Answers) -> Any:
    from scipy.stats import rankdata

    return _correlation(rankdata(answers.references), rankdata(answers.predictions))


def _correlation(x: Array, y: Array) -> Any:
    x, y = x - x.mean(), y - y.mean()  # of the size of their spread, or the differences below would cancel

    def coefficient(sums: Array) -> Array:
        total, of_x, of_y, of_xx, of_yy, of_xy = sums.T
        spread = (total * of_xx - of_x**2) * (total * of_yy - of_y**2)
        values: Array = (total * of_xy - of_x * of_y) / np.sqrt(spread)
        return values

    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1), coefficient


RESAMPLED = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
"""Metric → answers → (sums that a row adds to, [rows, sums]; the metric of [draws, sums])."""
