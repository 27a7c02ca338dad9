"""TER against sacreBLEU's."""

from __future__ import annotations

from itertools import zip_longest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.tasks.metrics import Undefined
from lora_cli.tasks.text.ter import ter
from tasks.text.corpora import PREDICTIONS, REFERENCES

LONG = "abcdefghijklabcabe"
LETTERS = st.lists(st.sampled_from("abcdeF"), max_size=9).map(" ".join)


def peer(texts: list[str], references: list[list[str]]) -> float:
    from sacrebleu.metrics.ter import TER

    return TER().corpus_score(texts, list(zip_longest(*references))).score


def test_score_is_sacrebleus():
    assert ter(PREDICTIONS, REFERENCES) == pytest.approx(peer(PREDICTIONS, REFERENCES)) == pytest.approx(56.47058823)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(LETTERS, st.lists(LETTERS, min_size=1, max_size=3)), max_size=3))
def test_score_of_any_texts_is_sacrebleus(rows):
    texts, references = [text for text, _ in rows] + ["a"], [targets for _, targets in rows] + [["a b"]]
    assert ter(texts, references) == pytest.approx(peer(texts, references))


@settings(max_examples=15, deadline=None)
@given(st.permutations(list(LONG)), st.integers(10, 18))
def test_score_of_many_shifts_is_sacrebleus(words, length):
    rows = [" ".join(words[:length])], [[" ".join(LONG)]]
    assert ter(*rows) == pytest.approx(peer(*rows))


@pytest.mark.mirror
def test_score_of_e2e_rows_is_sacrebleus(e2e_scored):
    texts, references = e2e_scored[0][::90], e2e_scored[1][::90]
    assert ter(texts, references) == pytest.approx(peer(texts, references))


def test_moving_a_block_is_one_edit():
    assert ter(["c d a b"], [["a b c d"]]) == pytest.approx(25)


def test_length_is_the_mean_of_the_references():
    assert ter(["a b"], [["a b c", "a"]]) == pytest.approx(100 * 1 / 2)


def test_references_without_a_word_leave_it_undefined():
    with pytest.raises(Undefined, match="no reference has a word"):
        ter(["a"], [[""]])
