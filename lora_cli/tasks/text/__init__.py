"""Generated text: how structured data becomes an input, and how outputs are scored. Knows text and numbers only."""

from __future__ import annotations

from lora_cli.tasks.text.linearise import (
    WEBNLG_SEEN,
    linearise_dart,
    linearise_e2e,
    linearise_webnlg,
    webnlg_group,
)
from lora_cli.tasks.text.scores import DOWNWARDS, TEXT_METRICS, exact_match, perplexity, text_score

__all__ = [
    "DOWNWARDS",
    "TEXT_METRICS",
    "WEBNLG_SEEN",
    "exact_match",
    "linearise_dart",
    "linearise_e2e",
    "linearise_webnlg",
    "perplexity",
    "text_score",
    "webnlg_group",
]
