"""The stemmer against NLTK's, which rouge-score uses."""

from __future__ import annotations

import re
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.tasks.text.porter import stem

SUFFIXES = (
    *("ational", "tional", "enci", "anci", "izer", "bli", "alli", "entli", "eli", "ousli", "ization", "ation", "ator"),
    *("alism", "iveness", "fulness", "ousness", "aliti", "iviti", "biliti", "fulli", "logi", "icate", "ative", "alize"),
    *("iciti", "ical", "ful", "ness", "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent"),
    *(
        "sion",
        "tion",
        "ion",
        "ou",
        "ism",
        "ate",
        "iti",
        "ous",
        "ive",
        "ize",
        "e",
        "ll",
        "sses",
        "ies",
        "ied",
        "s",
        "ss",
    ),
    *("eed", "ed", "ing", "y", "ly", "at", "bl", "iz"),
)
SPECIAL = (
    *("skies", "dying", "news", "innings", "proceed", "dies", "tied", "spied", "enjoy", "happy", "rationally"),
    *("logic", "apology", "controlling", "yyy", "y", "as"),
)
WORDS = st.builds(
    lambda root, endings: root + "".join(endings),
    st.text("abeilnosty", max_size=6),
    st.lists(st.sampled_from(SUFFIXES), max_size=3),
)


@pytest.fixture(scope="module")
def nltk_stem():
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer().stem


@settings(max_examples=1500, deadline=None)
@given(WORDS)
def test_stem_is_nltks(nltk_stem, word):
    assert stem(word) == nltk_stem(word)


@pytest.mark.parametrize("word", SPECIAL)
def test_stem_of_a_special_case_is_nltks(nltk_stem, word):
    assert stem(word) == nltk_stem(word)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("caresses", "caress"),
        ("ponies", "poni"),
        ("agreed", "agre"),
        ("plastered", "plaster"),
        ("hopping", "hop"),
        ("filing", "file"),
        ("relational", "relat"),
        ("vietnamization", "vietnam"),
        ("electriciti", "electr"),
        ("replacement", "replac"),
        ("adoption", "adopt"),
        ("controll", "control"),
    ],
)
def test_stem_of_the_papers_examples(word, expected):
    assert stem(word) == expected


@pytest.mark.mirror
def test_stems_of_all_e2e_words_are_nltks(e2e_test, nltk_stem):
    words = set(re.findall(r"\w+", " ".join(chain(*e2e_test.values())).lower()))
    assert {word: stem(word) for word in words} == {word: nltk_stem(word) for word in words}
