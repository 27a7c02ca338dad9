"""METEOR's subset against NLTK's where there is one alignment, and against all alignments where there are many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.tasks.metrics import Undefined
from lora_cli.tasks.text.meteor import _fewest_chunks, meteor_exact_stem
from lora_cli.tasks.text.words import caption_words
from tasks.text.corpora import PREDICTIONS, REFERENCES

DISTINCT = ["serve", "serving", "riverside", "pubs", "family", "rated", "cheaply", "near"]


class NoSynonyms:
    """WordNet, empty."""

    def synsets(self, _word: str) -> list[object]:
        return []


def nltk_meteor(text: str, target: str) -> float:
    from nltk.translate.meteor_score import single_meteor_score

    return 100 * single_meteor_score(caption_words(target), caption_words(text), wordnet=NoSynonyms())


@settings(max_examples=60, deadline=None)
@given(st.permutations(DISTINCT[1:]), st.permutations(DISTINCT[1:]), st.integers(1, 7), st.integers(1, 7))
def test_score_is_nltks_where_no_word_repeats(words, target, num_words, num_target):
    text, reference = " ".join(words[:num_words]), " ".join(target[:num_target])
    assert meteor_exact_stem([text], [[reference]]) == pytest.approx(nltk_meteor(text, reference))


def test_words_match_by_their_stem():
    assert meteor_exact_stem(["serves"], [["serving"]]) == pytest.approx(nltk_meteor("serves", "serving")) == 50


def test_score_of_a_worked_example():
    # 4 of 5 words match, of 6 wanted, in 2 chunks.
    p, r, penalty = 4 / 5, 4 / 6, 0.5 * (2 / 4) ** 3
    assert meteor_exact_stem(["a b x c d"], [["a b c d e f"]]) == pytest.approx(
        100 * 10 * p * r / (r + 9 * p) * (1 - penalty)
    )


def alignments(words: str, target: str) -> Iterator[list[int | None]]:
    """Every pairing of equal letters, one place in `target` or none for each of `words`."""
    spots = [*range(len(target)), *[None] * len(words)]
    for chosen in set(permutations(spots, len(words))):
        if all(spot is None or target[spot] == letter for letter, spot in zip(words, chosen, strict=True)):
            yield list(chosen)


def chunks(chosen: list[int | None]) -> int:
    pairs = zip([None, *chosen], chosen, strict=False)
    return sum(spot is not None and (last is None or spot != last + 1) for last, spot in pairs)


@settings(max_examples=60, deadline=None)
@given(st.text("abc", min_size=1, max_size=4), st.text("abc", min_size=1, max_size=5))
def test_alignment_has_the_fewest_chunks_of_all_with_the_most_matches(words, target):
    most = (Counter(words) & Counter(target)).total()
    full = [chosen for chosen in alignments(words, target) if len(chosen) - chosen.count(None) == most]
    assert _fewest_chunks(words, target) == min(map(chunks, full))


def test_counts_are_summed_over_the_corpus_with_the_best_reference_of_each():
    together = meteor_exact_stem(["a b", "c"], [["x", "a b"], ["c d"]])
    p, r, penalty = 3 / 3, 3 / 4, 0.5 * (2 / 3) ** 3
    assert together == pytest.approx(100 * 10 * p * r / (r + 9 * p) * (1 - penalty))
    assert 0 < meteor_exact_stem(PREDICTIONS, REFERENCES) < 100


def test_references_without_a_word_leave_it_undefined():
    with pytest.raises(Undefined, match="no reference has a word"):
        meteor_exact_stem(["a"], [["..."]])
