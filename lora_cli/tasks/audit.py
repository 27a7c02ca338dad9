"""What a data set looks like to the model: lengths, cuts, repeats, leaks, labels, padding. Knows rows and token ids;
nothing of tokenizers or screens."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_cli.spec import GenerationSpec, TaskSpec
from lora_cli.tasks.encoding import Encoded, Example
from lora_cli.tasks.rows import Rows, overlap, repeats
from lora_cli.tasks.sequences import EncodedTexts, TextExample

__all__ = ["Audit", "Lengths", "Padding", "Part", "SplitAudit", "audit_splits", "padding_share"]

_MAX_BINS = 12
_NICE = (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500)


@dataclass(frozen=True)
class Lengths:
    """How numbers spread; percentiles are numbers that occur."""

    mean: float
    median: float
    p95: float
    p99: float
    least: float
    most: float


@dataclass(frozen=True)
class Part:
    """A part of all examples: how long it is before anything is cut off, and how often something is."""

    tokens: Lengths
    limit: float
    """Most tokens that are kept."""
    room: float
    """Most that could be: what the model's positions leave for it."""
    cut: int
    """Examples in which more had to go."""
    key: str
    """The key that sets the limit."""


@dataclass(frozen=True, kw_only=True)
class SplitAudit:
    """Figures of one split."""

    rows: int
    unlabelled: int
    """Rows left out beforehand: the data set marks them as having no gold label."""
    examples: int
    tokens: int
    distinct_inputs: int
    repeated: int
    """Rows that already stood there, answer included where it is text."""
    contradictory: int
    """Examples that read the same as another one, which has another label."""
    shared: dict[str, int]
    """Other split, among those before this one → rows whose input stands there as well."""
    empty_inputs: int
    empty_answers: int
    unknown_tokens: int
    """Tokens that stand for text which the vocabulary lacks."""
    parts: dict[str, Part]
    histogram: list[int]
    """Examples by their tokens as the model reads them, in the bins of the audit."""
    labels: dict[str, int] | None
    """Label → examples; None: there are none."""
    values: Lengths | None
    """The numbers that a regression is to predict."""


@dataclass(frozen=True, kw_only=True)
class Padding:
    """Shares of a padded batch's positions that are padding, in the first epoch of the training."""

    batch_size: int
    window: int
    is_packed: bool
    """Whether the training computes none of it: see train.packing."""
    planned: float
    """As train.length_window has it."""
    shuffled: float
    """With train.length_window=1."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Figures of a data set."""

    task: str
    model: str
    positions: float
    """Tokens that the model has positions for; infinity: no limit is known."""
    bins: list[int]
    """Where the bins of the histograms begin; the last one has no end."""
    splits: dict[str, SplitAudit]
    padding: Padding


def audit_splits(
    task: Any,
    rows: Mapping[str, Rows],
    encoded: Mapping[str, Encoded],
    whole: Mapping[str, Encoded],
    *,
    positions: float,
    unknown: int | None,
) -> tuple[list[int], dict[str, SplitAudit]]:
    """(bins, figures) of all splits, in their order.

    `encoded` is what the model reads, `whole` the same with nothing cut. The model has `positions` for so many
    tokens; `unknown` is the id of the token for text that the vocabulary lacks, if it means nothing else.
    """
    lengths = {split: [example.num_tokens for example in found.examples] for split, found in encoded.items()}
    bins = _bins([length for found in lengths.values() for length in found])
    audits: dict[str, SplitAudit] = {}
    for split, found in rows.items():
        seen = encoded[split]
        is_text = isinstance(seen, EncodedTexts)
        audits[split] = SplitAudit(
            rows=len(found),
            unlabelled=found.num_unlabelled,
            examples=len(seen.examples),
            tokens=seen.num_tokens,
            distinct_inputs=len(found) - repeats(found, task.columns),
            repeated=repeats(found, task.all_columns),
            contradictory=0 if is_text else _contradictory(seen.examples),
            shared={earlier: overlap(rows[earlier], found, task.columns) for earlier in audits},
            empty_inputs=_num_blank(found, task.columns) if is_text else seen.num_empty,
            empty_answers=seen.num_empty if isinstance(seen, EncodedTexts) and seen.queries else 0,
            unknown_tokens=0 if unknown is None else _count(unknown, seen.examples),
            parts=_parts(task.spec, seen, whole[split], positions),
            histogram=np.bincount(np.searchsorted(bins, lengths[split], "right") - 1, minlength=len(bins)).tolist(),
            labels=_labels(seen.examples, task.labels),
            values=_spread([e.label for e in seen.examples]) if task.regression else None,
        )
    return bins, audits


def padding_share(examples: Sequence[Any], batches: Sequence[Sequence[int]]) -> float:
    """Share of all positions of padded batches that are padding; of an encoder-decoder both texts count."""
    computed = filled = 0
    for numbers in batches:
        for lengths in zip(*(_streams(examples[number]) for number in numbers), strict=True):
            flat = [length for of_example in lengths for length in of_example]
            computed += max(flat) * len(flat)
            filled += sum(flat)
    return 1 - filled / max(1, computed)


def _count(token: int, examples: Sequence[Any]) -> int:
    return sum(ids.count(token) for example in examples for ids in _read(example))


def _read(example: Example | TextExample) -> Sequence[list[int]]:
    """Sequences of tokens that the model reads."""
    return example.input_ids if isinstance(example, Example) else [example.input_ids]


def _streams(example: Example | TextExample) -> list[list[int]]:
    """Lengths of an example's sequences, by the tensor of a batch that they are padded in."""
    read = [[len(ids) for ids in _read(example)]]
    writes = isinstance(example, TextExample) and example.decoder_start is not None
    return [*read, [len(example.labels)]] if writes else read  # type: ignore[union-attr]


def _parts(spec: TaskSpec, seen: Encoded, whole: Encoded, positions: float) -> dict[str, Part]:
    def part(lengths: Sequence[int], limit: int, room: float, cut: int, key: str = "task.max_length") -> Part:
        return Part(_spread(lengths), min(limit, room), room, cut, key)

    lengths = [example.num_tokens for example in whole.examples]
    if not isinstance(whole, EncodedTexts) or not isinstance(seen, EncodedTexts) or not whole.queries:
        return {"text": part(lengths, spec.max_length, positions, seen.num_truncated)}
    learnt = [example.num_targets for example in whole.examples]
    if not isinstance(spec, GenerationSpec):
        parts = {"conversation": part(lengths, spec.max_length, positions, seen.num_truncated)}
        return {**parts, "learnt": part(learnt, spec.max_length, positions, 0)}
    longest = spec.max_target_length
    # Of a decoder, prompt and answer share the positions, in training as when it writes.
    reserved = max(longest, spec.decode.max_new_tokens) if whole.examples[0].decoder_start is None else 0
    prompts = [query.num_tokens for query in whole.queries]
    return {
        "prompt": part(prompts, spec.max_length, positions - reserved, seen.num_truncated),
        "answer": part(learnt, longest, positions, seen.num_cut_targets, "task.max_target_length"),
    }


def _spread(numbers: Sequence[float]) -> Lengths:
    median, p95, p99 = np.percentile(numbers, [50, 95, 99], method="inverted_cdf").tolist()
    return Lengths(float(np.mean(numbers)), median, p95, p99, min(numbers), max(numbers))


def _bins(lengths: Sequence[int]) -> list[int]:
    """Beginnings of at most _MAX_BINS bins of a round width; the longest hundredth shares the last one."""
    least, most = np.percentile(lengths, [0, 99], method="inverted_cdf").tolist()
    width = next((nice for nice in _NICE if most // nice - least // nice < _MAX_BINS), 1000)
    first = int(least // width * width)
    return list(range(first, max(most, first) + 1, width))[:_MAX_BINS]


def _num_blank(rows: Rows, columns: Sequence[str]) -> int:
    """Rows of which every cell of the input is empty."""
    return sum(all(_is_blank(row.get(column)) for column in columns) for row in rows)


def _is_blank(cell: object) -> bool:
    return not cell.strip() if isinstance(cell, str) else not cell


def _contradictory(examples: Sequence[Example]) -> int:
    labels: defaultdict[tuple[tuple[int, ...], ...], Counter[float]] = defaultdict(Counter)
    for example in examples:
        labels[tuple(map(tuple, example.input_ids))][example.label or 0] += 1
    return sum(counts.total() for counts in labels.values() if len(counts) > 1)


def _labels(examples: Sequence[Example], names: Sequence[str] | None) -> dict[str, int] | None:
    if names is None:
        return None
    counts = Counter(example.label for example in examples)
    return {name: counts[number] for number, name in enumerate(names)}
