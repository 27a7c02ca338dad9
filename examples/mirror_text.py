"""English text of a local mirror of data sets, and which of it is held out. Knows nothing of tokens or models."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from lora_cli.tasks.text.linearise import linearise_dart, linearise_webnlg

__all__ = ["END", "data_to_text", "dialogues", "prose", "split"]

END = "<|endoftext|>"
"""Between the data and their text; a causal model's tokenizer has it as one token."""
SAMSUM = "knkarthick/samsum/default/train"
PROSE = {
    "nyu-mll/glue/sst2/train": ["sentence"],
    "nyu-mll/glue/cola/train": ["sentence"],
    "nyu-mll/glue/mrpc/train": ["sentence1", "sentence2"],
    "nyu-mll/glue/rte/train": ["sentence1", "sentence2"],
    "nyu-mll/glue/stsb/train": ["sentence1", "sentence2"],
    "nyu-mll/glue/wnli/train": ["sentence1"],
    "nyu-mll/glue/qnli/train": ["question", "sentence"],
    "nyu-mll/glue/qqp/train": ["question1", "question2"],
    "nyu-mll/glue/mnli/validation_matched": ["premise", "hypothesis"],
    "stanfordnlp/snli/plain_text/validation": ["premise", "hypothesis"],
    "aps/super_glue/boolq/validation": ["passage"],
    "aps/super_glue/cb/train": ["premise"],
    "aps/super_glue/copa/train": ["premise", "choice1", "choice2"],
    SAMSUM: ["summary"],
}
"""Split → its columns of prose. SAMSum's dialogues come from `dialogues`."""


def rows(root: Path, split: str) -> list[dict[str, Any]]:
    """The rows of `hub id/config/split`; none if the mirror lacks it."""
    folder, _, name = split.rpartition("/")
    files = sorted((root / "datasets" / folder).glob(f"{name}-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def samsum(root: Path) -> list[dict[str, Any]]:
    """SAMSum's train rows, without those whose dialogue is in another split too."""
    others = (f"knkarthick/samsum/default/{name}" for name in ("validation", "test"))
    elsewhere = {row["dialogue"] for split in others for row in rows(root, split)}
    return [row for row in rows(root, SAMSUM) if row["dialogue"] not in elsewhere]


def dialogues(root: Path) -> list[str]:
    """SAMSum's train dialogues, each once."""
    return list(dict.fromkeys(row["dialogue"] for row in samsum(root)))


def prose(root: Path) -> list[str]:
    """Every text of PROSE once; of CoLA the acceptable sentences, of SST-2's nested phrases the outermost."""
    texts: list[str] = []
    for split, columns in PROSE.items():
        found = samsum(root) if split == SAMSUM else rows(root, split)
        kept = [row for row in found if "cola" not in split or row["label"] == 1]
        parts = [row[column].strip() for row in kept for column in columns]
        texts += outermost(parts) if "sst2" in split else parts
    return [text for text in dict.fromkeys(texts) if text]


def outermost(phrases: Sequence[str]) -> list[str]:
    """The phrases that are not inside another one."""
    kept, inner = [], set()
    for phrase in sorted(set(phrases), key=len, reverse=True):
        if phrase not in inner:
            kept.append(phrase)
            words = phrase.split()
            inner.update(" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1))
    return kept


def data_to_text(root: Path) -> list[str]:
    """`triples<|endoftext|> text` for WebNLG's train split and for what is DART's own in its validation split."""
    pairs = []
    for row in rows(root, "webnlg-challenge/web_nlg/webnlg_challenge_2017/train"):
        line = linearise_webnlg(row["modified_triple_sets"]["mtriple_set"][0])
        # Names as in WebNLG for every second text only: elsewhere data have blanks, and copying them is to be learnt.
        names = [line, line.replace("_", " ")]
        pairs += [(names[place % 2], text) for place, text in enumerate(row["lex"]["text"])]
    for row in rows(root, "Yale-LILY/dart/default/validation"):
        told = zip(row["annotations"]["source"], row["annotations"]["text"], strict=True)
        pairs += [(linearise_dart(row["tripleset"]), text) for source, text in told if source.startswith("Wiki")]
    return list(dict.fromkeys(f"{line}{END} {text.strip()}" for line, text in pairs))


def split(texts: Sequence[str], rng: random.Random) -> tuple[list[str], list[str]]:
    """Train and held-out texts, in random order. A text's own checksum decides, so that no seed moves one over."""
    texts = rng.sample(texts, len(texts))
    held_out = [text for text in texts if zlib.crc32(text.encode()) % 100 == 0]
    return [text for text in texts if zlib.crc32(text.encode()) % 100], held_out or texts[:1]
