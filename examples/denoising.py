"""What an encoder and decoder learn from plain text: spans and turns that are masked. Knows ids and texts, no model."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Sequence

import torch

__all__ = ["SENTINELS", "Batch", "corrupt", "gap", "padded"]

Batch = dict[str, torch.Tensor]

SENTINELS = [f"<extra_id_{i}>" for i in range(100)]
"""Tokens that stand for what is masked."""


def corrupt(ids: Sequence[int], sentinels: Sequence[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """Source and target of span corruption: 15 % of the tokens in spans of 3 on average, each span for one sentinel.

    The target is each sentinel and the span it stands for, then one sentinel more (arXiv:1910.10683, figure 2).
    """
    num_masked = max(1, round(0.15 * len(ids)))
    num_spans = min(max(1, round(num_masked / 3)), len(ids) - num_masked, len(sentinels) - 1)
    kept, masked = pieces(len(ids) - num_masked, num_spans, rng), pieces(num_masked, num_spans, rng)
    source, target, place = [], [], 0
    for sentinel, num_kept, num_gone in zip(sentinels, kept, masked, strict=False):
        source += [*ids[place : place + num_kept], sentinel]
        target += [sentinel, *ids[place + num_kept : place + num_kept + num_gone]]
        place += num_kept + num_gone
    return source, [*target, sentinels[num_spans]]


def pieces(total: int, number: int, rng: random.Random) -> list[int]:
    """`number` lengths of at least 1 that make `total`, every such list equally likely."""
    cuts = [0, *sorted(rng.sample(range(1, total), number - 1)), total]
    return [after - before for before, after in itertools.pairwise(cuts)]


def gap(dialogue: str) -> tuple[str, str]:
    """A dialogue with its most telling turn masked, and that turn: the highest ROUGE-1 F1 with all the others."""
    turns = dialogue.split("\n")
    words = [Counter(re.findall(r"\w+", turn.lower())) for turn in turns]
    everything = sum(words, Counter())

    def telling(place: int) -> int:
        """Twice this over the number of all words is the F1, and that number is every turn's."""
        return sum(min(count, everything[word] - count) for word, count in words[place].items())

    best = max(range(len(turns)), key=telling)
    return "\n".join([*turns[:best], SENTINELS[0], *turns[best + 1 :]]), turns[best]


def padded(pairs: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """A batch of sources (padded with 0) and targets (padded with -100, which no loss counts)."""

    def filled(ids: Sequence[list[int]], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(i) for i in ids], batch_first=True, padding_value=value)

    source = filled([source for source, _ in pairs], 0)
    mask = filled([[1] * len(source) for source, _ in pairs], 0)
    return {"input_ids": source, "attention_mask": mask, "labels": filled([target for _, target in pairs], -100)}
