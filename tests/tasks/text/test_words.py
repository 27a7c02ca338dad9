"""The tokenizers: what Stanford's, rouge-score's and mteval's make of the same texts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.tasks.text.words import caption_words, mteval_words, ngram_counts, rouge_words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Prices at Zizzi start from £20-25, and it doesn't!", "prices at zizzi start from £ 20-25 and it does n't"),
        ('There\'s a family-friendly pub: "Cotto".', "there 's a family-friendly pub cotto"),
        ("They cannot eat at 5:30 p.m. in St. Ives.", "they can not eat at 5:30 p.m. in st. ives"),
        ("O'Donnell's 1,000 km/h (approx.) trip", "o'donnell 's 1,000 km/h ( approx ) trip"),
    ],
)
def test_caption_words_are_stanfords(text, expected):
    assert caption_words(text) == expected.split()


def test_mteval_words_split_punctuation_but_not_numbers_and_no_apostrophes():
    words = mteval_words("It's 3.5 km, £20-25 &amp; CAFÉ.")
    assert words == ["it's", "3.5", "km", ",", "£20", "-", "25", "&", "cafÉ", "."]


def test_mteval_words_join_lines_before_anything_else():
    assert mteval_words("family-\nfriendly\npub") == ["family-", "friendly", "pub"]


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_rouge_words_are_rouge_scores(text):
    from nltk.stem.porter import PorterStemmer
    from rouge_score.tokenize import tokenize

    assert rouge_words(text) == tokenize(text, PorterStemmer())


def test_ngram_counts_has_every_order():
    assert ngram_counts(["a", "a", "b"], 2) == {("a",): 2, ("b",): 1, ("a", "a"): 1, ("a", "b"): 1}
