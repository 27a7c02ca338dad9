"""CIDEr-D against the figures of the E2E challenge's script, and by hand."""

from __future__ import annotations

import math

import pytest

from lora_cli.tasks.metrics import Undefined
from lora_cli.tasks.text.cider import cider
from tasks.text.corpora import PREDICTIONS, REFERENCES


def test_score_is_the_scripts():
    assert cider(PREDICTIONS, REFERENCES) == pytest.approx(2.8714163124912035)


@pytest.mark.mirror
def test_score_of_the_e2e_test_set_is_the_scripts(e2e_scored):
    # Not to the last digit: Stanford's tokenizer is approximated.
    assert cider(*e2e_scored) == pytest.approx(1.4722283774, abs=5e-4)


def test_score_of_a_worked_example():
    # Words and pairs agree, triples and fours there are none: 10 * (1 + 1 + 0 + 0) / 4.
    assert cider(["a b", "c d"], [["a b"], ["c d"]]) == pytest.approx(5.0)
    # One of two words, all of idf log 2: cosine 1/2 of words, none of pairs.
    assert cider(["a x", "c d"], [["a b"], ["c d"]]) == pytest.approx((10 * (1 / 2) / 4 + 5.0) / 2)
    # a twice against once: the clipped product 1 over sqrt(5) sqrt(2) for words; (a a), (a b) against (a b).
    words, pairs = 2 / (math.sqrt(5) * math.sqrt(2)), 1 / math.sqrt(2)
    near = math.exp(-1 / 72)
    assert cider(["a a b", "c d"], [["a b"], ["c d"]]) == pytest.approx((10 * near * (words + pairs) / 4 + 5) / 2)


def test_an_ngram_of_every_row_weighs_nothing():
    assert cider(["a b", "a d"], [["a x"], ["a y"]]) == 0


def test_a_perfect_score_is_10():
    texts = ["one two three four five", "six seven eight nine"]
    assert cider(texts, [[text] for text in texts]) == pytest.approx(10)


def test_one_row_or_no_words_leave_it_undefined():
    with pytest.raises(Undefined, match="one row"):
        cider(["a"], [["a"]])
    with pytest.raises(Undefined, match="no reference has a word"):
        cider(["a", "b"], [["."], [""]])
