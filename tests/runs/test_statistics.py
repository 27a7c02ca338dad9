"""Tests of significance against other formulations, and against chance itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lora_cli.runs.statistics import RESAMPLED, Answers, interval, mcnemar, paired_bootstrap, resampled
from lora_cli.tasks.metrics import score

CLASSES = ("accuracy", "macro_f1", "matthews")


def answers(references: object, predictions: object) -> Answers:
    return Answers(np.asarray(references), np.asarray(predictions))


def guesses(seed: int, *, rows: int = 300, right: float = 0.7) -> Answers:
    """Two labels, of which a share of `right` is found."""
    draws = np.random.default_rng(seed)
    references = np.random.default_rng(99).integers(2, size=rows)
    return Answers(references, np.where(draws.random(rows) < right, references, 1 - references))


# In steps of a millionth: squares of differences below 1e-162 are no numbers, for scipy neither.
@given(st.lists(st.integers(-(10**7), 10**7).map(lambda number: number / 10**6), min_size=3, max_size=8, unique=True))
def test_the_interval_is_students(values: list[float]) -> None:
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert interval(values) == pytest.approx((low, high))


def test_one_seed_has_no_interval() -> None:
    assert interval([0.8]) is None


@given(metric=st.sampled_from([*CLASSES, "f1"]), seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_a_row_with_a_weight_counts_as_so_many_rows(metric: str, seed: int) -> None:
    draws = np.random.default_rng(seed)
    labels = 2 if metric == "f1" else draws.integers(2, 5)
    references, predictions = draws.integers(labels, size=(2, 25))
    weights = draws.poisson(1, size=25)
    rows, metric_of = RESAMPLED[metric](Answers(references, predictions))
    with np.errstate(all="ignore"):
        (found,) = metric_of(weights[None] @ rows)
    repeated = [np.repeat(ids, weights).tolist() for ids in (predictions, references)]
    if not repeated[0]:
        return
    expected, undefined = score(metric, predictions=repeated[0], references=repeated[1])
    if undefined:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(expected, abs=1e-12)


@given(seed=st.integers(0, 10_000), shift=st.sampled_from([0.0, 1000.0]))
@settings(max_examples=40, deadline=None)
def test_a_correlation_of_weighted_rows_is_that_of_so_many_rows(seed: int, shift: float) -> None:
    draws = np.random.default_rng(seed)
    references = draws.normal(size=30) + shift
    predictions = references + draws.normal(size=30)
    weights = draws.poisson(1, size=30)
    rows, metric_of = RESAMPLED["pearson"](Answers(references, predictions))
    (found,) = metric_of(weights[None] @ rows)
    expected = stats.pearsonr(np.repeat(references, weights), np.repeat(predictions, weights)).statistic
    assert found == pytest.approx(expected, abs=1e-9)
    rows, metric_of = RESAMPLED["spearman"](Answers(references, predictions))
    (found,) = metric_of(np.ones((1, 30)) @ rows)
    assert found == pytest.approx(stats.spearmanr(references, predictions).statistic, abs=1e-9)


def test_the_spread_over_draws_is_that_of_the_binomial() -> None:
    one = guesses(1, rows=2000)
    accuracy = float((one.references == one.predictions).mean())
    (found,) = resampled("accuracy", [one])
    assert found.mean() == pytest.approx(accuracy, abs=2e-3)
    assert found.std() == pytest.approx((accuracy * (1 - accuracy) / 2000) ** 0.5, rel=0.08)


def test_equal_predictions_are_never_told_apart() -> None:
    assert paired_bootstrap("accuracy", [guesses(1)], [guesses(1)], paired=True) == 1.0
    assert mcnemar(guesses(1), guesses(1)) == 1.0


def test_a_clear_difference_is_shown() -> None:
    better, worse = guesses(1, right=0.9), guesses(2, right=0.6)
    assert paired_bootstrap("accuracy", [better], [worse], paired=True) < 0.002
    assert mcnemar(better, worse) < 0.001


def test_what_is_as_good_is_called_different_as_rarely_as_the_level_says() -> None:
    found = [paired_bootstrap("accuracy", [guesses(2 * n)], [guesses(2 * n + 1)], paired=True) for n in range(150)]
    share = np.mean(np.asarray(found) < 0.05)
    assert 0.005 < share < 0.11, "5 % of 150, give or take three standard errors"
    assert stats.kstest(found, "uniform").pvalue > 0.001


def test_p_is_about_that_of_a_paired_z_test() -> None:
    for seed in range(5):
        ours, theirs = guesses(seed, right=0.72), guesses(100 + seed, right=0.68)
        difference = (ours.references == ours.predictions).astype(float) - (theirs.references == theirs.predictions)
        z = difference.mean() / (difference.std() / len(difference) ** 0.5)
        expected = 2 * stats.norm.sf(abs(z))
        assert paired_bootstrap("accuracy", [ours], [theirs], paired=True) == pytest.approx(expected, abs=0.04)


def test_seeds_are_drawn_too_and_one_lucky_seed_shows_less_than_three_good_ones() -> None:
    low = [guesses(seed, right=0.7) for seed in (1, 2, 3)]
    lucky = [guesses(11, right=0.9), *(guesses(seed, right=0.7) for seed in (12, 13))]
    good = [guesses(seed, right=0.8) for seed in (21, 22, 23)]
    assert paired_bootstrap("accuracy", good, low, paired=True) < 0.01
    assert paired_bootstrap("accuracy", lucky, low, paired=True) > 0.01


def test_mcnemar_is_the_binomial_test_of_rows_that_only_one_gets_right() -> None:
    references = np.zeros(20, dtype=int)
    ours = answers(references, [0] * 15 + [1] * 5)
    theirs = answers(references, [1] * 9 + [0] * 6 + [0] * 2 + [1] * 3)
    assert mcnemar(ours, theirs) == pytest.approx(stats.binomtest(9, 11).pvalue)


def test_a_metric_that_a_draw_does_not_have_is_left_out_of_it() -> None:
    one = answers([0, 0, 0, 1], [0, 0, 1, 1])
    assert 0 < paired_bootstrap("matthews", [one], [one], paired=True) <= 1
