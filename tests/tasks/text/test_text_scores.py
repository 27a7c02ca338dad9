"""What holds for every measure of generated text, and for the table that names them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings

from lora_cli.tasks.metrics import Undefined
from lora_cli.tasks.text import DOWNWARDS, TEXT_METRICS, exact_match, perplexity, text_score
from tasks.text.corpora import PREDICTIONS, REFERENCES, ROWS, Rows, split

LONG = ["the mill is a cheap pub", "blue spice serves indian food by the river", "cotto is a coffee shop in town"]


def scored(name: str, rows: Rows) -> tuple[float | None, str | None]:
    texts, references = split(rows)
    value, reason = text_score(name, predictions=texts, references=references)
    return value if value is None else round(value, 8), reason


@pytest.mark.parametrize("name", TEXT_METRICS)
@settings(max_examples=10, deadline=None)
@given(rows=ROWS)
def test_order_of_the_rows_does_not_matter(name, rows: Rows):
    assert scored(name, rows) == scored(name, rows[::-1])


# Not of chrF: of references that share nothing with a text, sacrebleu's counts those of the first.
@pytest.mark.parametrize("name", sorted(set(TEXT_METRICS) - {"chrf"}))
@settings(max_examples=10, deadline=None)
@given(rows=ROWS)
def test_order_of_the_references_does_not_matter(name, rows: Rows):
    turned = [(text, targets[::-1]) for text, targets in rows]
    assert scored(name, rows) == scored(name, turned)


# Not of NIST: leaving out a word that all references have raises the information per word.
@pytest.mark.parametrize("name", sorted(set(TEXT_METRICS) - DOWNWARDS - {"nist"}))
@settings(max_examples=10, deadline=None)
@given(rows=ROWS)
def test_no_text_scores_above_the_reference_itself(name, rows: Rows):
    texts, references = split([*rows, (LONG[0], [LONG[0]])])
    single = [targets[:1] for targets in references]
    perfect = [targets[0] for targets in references]
    assert TEXT_METRICS[name](texts, single) <= TEXT_METRICS[name](perfect, single) + 1e-9


@pytest.mark.parametrize("name", sorted(set(TEXT_METRICS) - {"nist", "cider", "meteor_exact_stem", "ter"}))
def test_perfect_texts_score_100(name):
    assert TEXT_METRICS[name](LONG, [["something else", text] for text in LONG]) == pytest.approx(100)


def test_perfect_texts_have_no_edits_and_a_chunk_each():
    assert TEXT_METRICS["ter"](LONG, [[text] for text in LONG]) == 0
    chunks, words = 3, 21
    assert TEXT_METRICS["meteor_exact_stem"](LONG, [[text] for text in LONG]) == pytest.approx(
        100 * (1 - 0.5 * (chunks / words) ** 3)
    )


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_empty_texts_score_worst(name):
    worst = 100.0 if name == "ter" else 0.0
    assert text_score(name, predictions=[""] * 3, references=[[text] for text in LONG]) == (worst, None)


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_a_measure_never_gives_nan(name):
    value, reason = text_score(name, predictions=["", " "], references=[[""], ["", " "]])
    assert (value is None) == (reason is not None)
    assert value is None or math.isfinite(value)


def test_text_score_is_the_value_or_the_reason():
    assert text_score("bleu", predictions=PREDICTIONS, references=REFERENCES) == (pytest.approx(44.4497880), None)
    assert text_score("bleu", predictions=[], references=[]) == (None, "no rows")
    assert text_score("bleu", predictions=["a", "b"], references=[["a"], []]) == (None, "row 2 has no reference")
    assert text_score("ter", predictions=["a"], references=[[""]]) == (None, "no reference has a word")
    with pytest.raises(ValueError, match="2 texts, but references for 1"):
        text_score("bleu", predictions=["a", "b"], references=[["a"]])


def test_exact_match_sees_case_but_not_white_space():
    assert exact_match([" a  b\n", "A b", "c"], [["x", "a b"], ["a b"], ["c"]]) == pytest.approx(100 * 2 / 3)


def test_perplexity_is_e_to_the_mean_loss():
    assert perplexity(4 * math.log(50257), 4) == pytest.approx(50257)
    assert perplexity(0.0, 3) == 1


@pytest.mark.parametrize(("nll", "num_tokens"), [(0.0, 0), (math.nan, 2), (math.inf, 2), (1e6, 1)])
def test_perplexity_without_a_finite_value_is_undefined(nll, num_tokens):
    with pytest.raises(Undefined):
        perplexity(nll, num_tokens)


def test_importing_the_table_loads_no_heavy_library():
    script = "import sys, lora_cli.tasks.text.scores; print({'sacrebleu', 'torch', 'nltk'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
@pytest.mark.mirror
def test_all_measures_of_the_e2e_test_set_take_seconds(e2e_scored):
    began = time.process_time()
    scores = {name: text_score(name, predictions=e2e_scored[0], references=e2e_scored[1]) for name in TEXT_METRICS}
    assert time.process_time() - began < 30
    assert all(value is not None for value, _ in scores.values())
    # sacreBLEU's own TER of these takes two minutes.
    assert scores["ter"][0] == pytest.approx(50.768636, abs=5e-7)
