"""Scores of text: by group, in the split's order, and none where there is none."""

from __future__ import annotations

import math

import pytest
import torch

from lora_cli.spec import GenerationSpec
from lora_cli.tasks.generation import Generation
from lora_cli.tasks.sequences import IGNORED, Query
from lora_cli.tasks.text import text_score
from lora_cli.tasks.text_scoring import TextScorer

LABELS = torch.tensor([[IGNORED, 1, 2], [IGNORED, 0, IGNORED]])
LOGITS = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
ANSWERS = [
    (Query(0, "p", [1], ["the cat sat on the mat", "a cat sat"], "seen"), "the cat sat on a mat"),
    (Query(1, "q", [1], ["a dog ran away fast"], "unseen"), "a dog ran away fast"),
    (Query(2, "r", [1], ["so it goes on and on"], "seen"), "so it goes"),
]


def scorer_of(*metrics: str, **values: object) -> TextScorer:
    return Generation(GenerationSpec(name="t", metrics=list(metrics), **values)).scorer()


def test_the_loss_has_no_smoothing_and_is_a_mean_over_tokens() -> None:
    scorer = scorer_of("perplexity", label_smoothing=0.3)
    scorer.add(LOGITS[:1], {"labels": LABELS[:1]}, [0])
    scorer.add(LOGITS[1:], {"labels": LABELS[1:]}, [1])
    log_p = LOGITS.log_softmax(-1)
    mean = -(log_p[0, 0, 1] + log_p[0, 1, 2] + log_p[1, 0, 0]).item() / 3
    assert scorer.result() == {"perplexity": pytest.approx(math.exp(mean)), "loss": pytest.approx(mean)}
    assert scorer.predictions == []


def test_answers_are_scored_whole_and_by_group_whatever_their_order() -> None:
    scorer = scorer_of("bleu", "rougeL", group="g")
    for query, text in reversed(ANSWERS):
        scorer.add_answer(query, text)
    found = scorer.result()
    for name in ("bleu", "rougeL"):
        for suffix, rows in (("", ANSWERS), ("/seen", ANSWERS[::2]), ("/unseen", ANSWERS[1:2])):
            expected, _ = text_score(name, predictions=[t for _, t in rows], references=[q.references for q, _ in rows])
            assert found[name + suffix] == pytest.approx(expected)
    assert found["bleu/unseen"] == pytest.approx(100)
    assert [row["index"] for row in scorer.predictions] == [0, 1, 2]
    assert scorer.predictions[1] == {
        "index": 1,
        "prompt": "q",
        "prediction": "a dog ran away fast",
        "references": ["a dog ran away fast"],
        "group": "unseen",
    }


def test_a_metric_without_a_value_says_why() -> None:
    scorer = scorer_of("bleu", "exact_match")
    scorer.add_answer(Query(0, "p", [1], []), "x")
    assert scorer.result() == {"bleu": None, "exact_match": None}
    assert scorer.undefined == {"bleu": "row 1 has no reference", "exact_match": "row 1 has no reference"}
    scorer.add(torch.zeros(1, 2, 4), {"labels": torch.full((1, 2), -100)}, [0])
    assert scorer.undefined.items() >= {"perplexity": "no tokens", "loss": "no tokens"}.items()


def test_an_answer_that_comes_later_counts() -> None:
    scorer = scorer_of("exact_match")
    scorer.add_answer(*ANSWERS[1])
    assert scorer.result()["exact_match"] == 100
    scorer.add_answer(*ANSWERS[2])
    assert scorer.result()["exact_match"] == 50
    assert scorer.confusion is None
    assert "group" not in (scorer_of("bleu").predictions or [{}])[0]
