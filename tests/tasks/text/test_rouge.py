"""ROUGE against the package rouge-score, and the E2E challenge's own against its script."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.tasks.metrics import Undefined
from lora_cli.tasks.text.rouge import e2e_rouge_l, rouge_1, rouge_2, rouge_l, rouge_lsum
from tasks.text.corpora import PREDICTIONS, REFERENCES, ROWS, Rows, split

OURS = {"rouge1": rouge_1, "rouge2": rouge_2, "rougeL": rouge_l, "rougeLsum": rouge_lsum}
LINES = st.lists(st.lists(st.sampled_from("abcd"), max_size=6).map(" ".join), min_size=1, max_size=4).map("\n".join)


@pytest.fixture(scope="session")
def peer(rouge_scorer: ModuleType) -> Callable[[str, list[str], list[list[str]]], float]:
    """The mean F1 in percent by rouge-score."""

    def score(name: str, texts: list[str], references: list[list[str]]) -> float:
        scorer = rouge_scorer.RougeScorer([name], use_stemmer=True)
        pairs = zip(texts, references, strict=True)
        return 100 * mean(scorer.score_multi(targets, text)[name].fmeasure for text, targets in pairs)

    return score


@pytest.mark.parametrize("name", OURS)
def test_scores_are_rouge_scores(peer, name):
    assert OURS[name](PREDICTIONS, REFERENCES) == pytest.approx(peer(name, PREDICTIONS, REFERENCES))


@pytest.mark.parametrize("name", OURS)
@settings(max_examples=30, deadline=None)
@given(ROWS)
def test_scores_of_any_texts_are_rouge_scores(peer, name, rows: Rows):
    texts, references = split([*rows, ("a", ["a"])])
    assert OURS[name](texts, references) == pytest.approx(peer(name, texts, references))


@settings(max_examples=100, deadline=None)
@given(LINES, st.lists(LINES, min_size=1, max_size=2))
def test_lsum_of_many_sentences_is_rouge_scores(peer, text, targets):
    rows = [text, "a"], [targets, ["a"]]
    assert rouge_lsum(*rows) == pytest.approx(peer("rougeLsum", *rows))


@pytest.mark.mirror
@pytest.mark.parametrize("name", OURS)
def test_scores_of_samsum_are_rouge_scores(peer, name, mirror):
    import pyarrow.parquet as parquet

    path = mirror / "datasets/knkarthick/samsum/default/test-00000-of-00001.parquet"
    rows = parquet.read_table(path).slice(0, 60).to_pylist()
    lead_3 = ["\n".join(row["dialogue"].splitlines()[:3]) for row in rows]
    references = [[row["summary"].replace(". ", ".\n")] for row in rows]
    assert OURS[name](lead_3, references) == pytest.approx(peer(name, lead_3, references))


def test_e2e_rouge_l_is_the_scripts():
    assert e2e_rouge_l(PREDICTIONS, REFERENCES) / 100 == pytest.approx(0.6068946474033299)


@pytest.mark.mirror
def test_e2e_rouge_l_of_the_e2e_test_set_is_the_scripts(e2e_scored):
    # Not to the last digit: Stanford's tokenizer is approximated.
    assert e2e_rouge_l(*e2e_scored) / 100 == pytest.approx(0.5871258348, abs=1e-5)


def test_e2e_rouge_l_of_a_worked_example():
    # Precision 2/2 from the first reference, recall 2/3 from the second.
    p, r = 1.0, 2 / 3
    expected = 100 * (1 + 1.44) * p * r / (r + 1.44 * p)
    assert e2e_rouge_l(["a b"], [["a x y z b"], ["a x b"]][1:]) == pytest.approx(expected)
    assert e2e_rouge_l(["a b"], [["a x y z b", "a x b"]]) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [*OURS.values(), e2e_rouge_l])
def test_references_without_a_word_leave_it_undefined(metric):
    with pytest.raises(Undefined):
        metric(["a"], [["..."]])


def test_a_script_that_the_tokenizer_does_not_know_is_undefined_and_not_0():
    with pytest.raises(Undefined, match="letter a-z or a digit"):
        rouge_1(["天气很好"], [["天气很好"]])
