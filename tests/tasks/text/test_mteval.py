"""e2e_bleu and nist against the figures of mteval-v13a-sig.pl as measure_scores.py of the E2E challenge calls it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings

from lora_cli.tasks.metrics import Undefined
from lora_cli.tasks.text.mteval import e2e_bleu, nist
from lora_cli.tasks.text.translation import bleu
from lora_cli.tasks.text.words import mteval_words
from tasks.text.corpora import PREDICTIONS, REFERENCES, ROWS, Rows, split

SINGLE = [targets[:1] for targets in REFERENCES]
SHORT = (["Mill pub the", "cheap Spice"], [["the pub Mill"], ["Spice is cheap", "Spice"]])


@pytest.mark.parametrize(
    ("texts", "references", "bleu_of_script", "nist_of_script"),
    [
        (PREDICTIONS, REFERENCES, 0.4445, 4.4557),
        (PREDICTIONS, SINGLE, 0.2559, 3.5748),
        (*SHORT, 0.4518, 2.6074),
    ],
    ids=["several references", "one reference", "no pair matches and no text has four words"],
)
def test_scores_are_those_of_the_script(texts, references, bleu_of_script, nist_of_script):
    assert e2e_bleu(texts, references) / 100 == pytest.approx(bleu_of_script, abs=5e-5)
    assert nist(texts, references) == pytest.approx(nist_of_script, abs=5e-5)


@pytest.mark.mirror
def test_scores_of_the_e2e_test_set_are_those_of_the_script(e2e_scored):
    assert e2e_bleu(*e2e_scored) / 100 == pytest.approx(0.4484, abs=5e-5)
    assert nist(*e2e_scored) == pytest.approx(7.6475, abs=5e-5)


@settings(max_examples=40, deadline=None)
@given(ROWS)
def test_e2e_bleu_is_nltks_where_every_order_matches(rows: Rows):
    from nltk.translate.bleu_score import corpus_bleu

    texts, references = split([*rows, ("a b c d e", ["a b c d e"])])
    # NLTK counts an n-gram for a text too short to have one.
    texts = [f"{text} near the mill pub" for text in texts]
    expected = corpus_bleu(
        [[mteval_words(t) for t in targets] for targets in references], [mteval_words(t) for t in texts]
    )
    assert e2e_bleu(texts, references) / 100 == pytest.approx(expected)


def test_e2e_bleu_ignores_the_case_of_ascii_letters_only():
    assert e2e_bleu(["THE MILL IS A PUB"], [["the mill is a pub"]]) == pytest.approx(100)
    assert bleu(["THE MILL IS A PUB"], [["the mill is a pub"]]) == 0
    assert e2e_bleu(["CAFÉ"], [["café"]]) < 100


def test_e2e_bleu_falls_as_a_text_that_only_matches_gets_shorter():
    reference = "a b c d e f g h i j k l"
    scores = [e2e_bleu([reference[: 2 * length]], [[reference]]) for length in range(1, 13)]
    assert scores == sorted(scores)
    assert scores[-1] == pytest.approx(100)
    assert scores[5] == pytest.approx(100 * math.exp(1 - 12 / 6))


def test_brevity_penalty_takes_the_shorter_of_two_equally_close_references():
    # 5 words; the references have 4 and 6: with 6 the penalty would be e^(1 - 6/5).
    assert e2e_bleu(["a b c d e"], [["a b c d e f", "a b c d"]]) == pytest.approx(100)


def test_nist_of_a_worked_example():
    # 4 words, each once in 4: log2(4/1) = 2 bits a word; a pair adds log2(1/1) = 0 bits.
    assert nist(["a b c d"], [["a b c d"]]) == pytest.approx(2.0)
    # Two thirds of the length: the penalty halves what two words of log2(3/1) bits bring.
    assert nist(["a b"], [["a b c"]]) == pytest.approx(math.log2(3) / 2)


def test_blank_references_beside_others_do_not_count():
    assert nist(PREDICTIONS, [[*targets, " "] for targets in REFERENCES]) == nist(PREDICTIONS, REFERENCES)
    assert e2e_bleu([" ", "a"], [["", "a b"], ["a"]]) == e2e_bleu([" ", "a"], [["a b"], ["a"]])


def test_without_words_bleu_is_0_and_nist_needs_a_reference():
    assert e2e_bleu([""], [["a"]]) == nist([""], [["a"]]) == 0
    with pytest.raises(Undefined, match="no reference has a word"):
        nist(["a"], [[""]])
