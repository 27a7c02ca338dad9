"""bleu and chrf: the examples of sacreBLEU's documentation."""

from __future__ import annotations

import math

import pytest

from lora_cli.tasks.text.mteval import e2e_bleu
from lora_cli.tasks.text.translation import bleu, chrf
from tasks.text.corpora import PREDICTIONS, REFERENCES

DOG = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
DOG_REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


def test_scores_are_those_of_sacrebleus_documentation():
    assert bleu(DOG, DOG_REFERENCES) == pytest.approx(48.530827009929865)
    assert chrf(DOG, DOG_REFERENCES) == pytest.approx(59.73, abs=5e-3)


def test_bleu_of_a_worked_example():
    # 4 words of 5 match, 3 pairs of 4, 2 triples of 3, 1 of 2 fours; 5 words against 6.
    precisions = [4 / 5, 3 / 4, 2 / 3, 1 / 2]
    expected = 100 * math.exp(1 - 6 / 5) * math.prod(precisions) ** (1 / 4)
    assert bleu(["a b c d x"], [["a b c d e f"]]) == pytest.approx(expected)


def test_rows_may_have_uneven_numbers_of_references():
    lower = [text.lower() for text in PREDICTIONS]
    references = [[text.lower() for text in targets] for targets in REFERENCES]
    assert bleu(lower, references) == pytest.approx(e2e_bleu(lower, references))
