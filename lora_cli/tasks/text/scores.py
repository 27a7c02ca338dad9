"""The measures of generated text by name, and those too short for a file. Knows texts and numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lora_cli.tasks.metrics import Undefined
from lora_cli.tasks.text.cider import cider
from lora_cli.tasks.text.meteor import meteor_exact_stem
from lora_cli.tasks.text.mteval import e2e_bleu, nist
from lora_cli.tasks.text.rouge import e2e_rouge_l, rouge_1, rouge_2, rouge_l, rouge_lsum
from lora_cli.tasks.text.ter import ter
from lora_cli.tasks.text.translation import bleu, chrf

__all__ = ["DOWNWARDS", "TEXT_METRICS", "exact_match", "perplexity", "text_score"]


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Texts equal to one of their references in percent; case counts, the amount of white space does not."""
    pairs = zip(predictions, references, strict=True)
    return 100 * sum(_spaced(text) in map(_spaced, texts) for text, texts in pairs) / len(predictions)


def _spaced(text: str) -> str:
    return " ".join(text.split())


TEXT_METRICS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], float]] = {
    "bleu": bleu,
    "e2e_bleu": e2e_bleu,
    "nist": nist,
    "meteor_exact_stem": meteor_exact_stem,
    "rouge1": rouge_1,
    "rouge2": rouge_2,
    "rougeL": rouge_l,
    "rougeLsum": rouge_lsum,
    "e2e_rougeL": e2e_rouge_l,
    "cider": cider,
    "chrf": chrf,
    "ter": ter,
    "exact_match": exact_match,
}
"""Name → corpus score of texts and their references. NIST and CIDEr in their own units, all others 0 to 100."""

DOWNWARDS = frozenset({"ter", "perplexity"})
"""Measures of which less is better."""


def text_score(
    name: str, *, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float | None, str | None]:
    """(corpus score, None), or (None, why there is none). One text per row, and one reference or more.

    Raises:
        ValueError: not as many rows of references as texts.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} texts, but references for {len(references)}")
    if not predictions:
        return None, "no rows"
    without = next((row for row, texts in enumerate(references, 1) if not texts), None)
    if without is not None:
        return None, f"row {without} has no reference"
    try:
        return TEXT_METRICS[name](predictions, references), None
    except Undefined as reason:
        return None, str(reason)


def perplexity(nll: float, num_tokens: int) -> float:
    """e^(nll / num_tokens), from 1; `nll` is the sum of -ln p over the tokens (Jelinek et al. 1977).

    Raises:
        Undefined: there are no tokens, or the value is not a finite number.
    """
    if not num_tokens:
        raise Undefined("no tokens")
    try:
        value = math.exp(nll / num_tokens)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise Undefined("not a finite number")
    return value
