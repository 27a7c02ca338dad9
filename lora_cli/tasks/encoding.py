"""From text cells to token ids. Knows rows and a tokenizer, nothing of labels or models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lora_cli.errors import ModelError
from lora_cli.tasks.prompts import cell_text
from lora_cli.tasks.rows import Rows, unknown

if TYPE_CHECKING:
    import torch

__all__ = ["AT_ONCE", "Encoded", "Example", "Reader", "columns_of", "encode_rows", "padded", "text_cells"]

_FIELD = re.compile(r"\{([^{}]+)\}")
_CHARACTERS_PER_TOKEN = 50
"""Text beyond this many characters per token that fits is dropped before tokenizing, and counted as truncated:
the tokenizer would else lay out all of it, for a pair all combinations of the pieces of both texts."""
AT_ONCE = 1024
"""Texts in one call of the tokenizer: what it keeps of each besides the ids is many times as large."""


class Reader(Protocol):
    """What a task has to know of the model that will read its examples."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""

    @property
    def decoder_start(self) -> int | None:
        """The token that an encoder-decoder's answer starts from; None: not an encoder-decoder that writes."""


@dataclass(frozen=True)
class Example:
    """One row as the model reads it; `input_ids` holds one sequence, or one per candidate answer."""

    index: int
    """Position among the rows."""
    input_ids: tuple[list[int], ...]
    token_type_ids: tuple[list[int], ...] | None
    label: int | float | None

    @property
    def num_tokens(self) -> int:
        """Length of the longest sequence."""
        return max(len(ids) for ids in self.input_ids)


@dataclass(frozen=True)
class Encoded:
    """A split's examples, and what happened on the way."""

    examples: Sequence[Any]
    num_truncated: int
    """Rows of which text was cut off."""
    num_empty: int
    """Rows with a text that is empty, or blank."""
    num_tokens: int
    """Tokens of all sequences, special ones included."""


def columns_of(entry: str) -> tuple[str, ...]:
    """Columns that one entry of task.text reads: itself, or those in the braces of a template."""
    return tuple(_FIELD.findall(entry)) or (entry,)


def encode_rows(
    rows: Rows,
    tokenizer: Any,
    *,
    text: Sequence[str],
    choices: Sequence[str],
    max_length: int,
    labels: Sequence[int | float | None],
) -> Encoded:
    """Tokenize all rows in one call, cut to `max_length` tokens, the longest text of a pair first.

    `text` holds one column or template for a single text, two for a pair. With `choices`, each of these columns is
    the second text of a candidate of its own, and all of `text` together the first.

    Raises:
        DataError: a column is missing, or a cell is no text.
        ModelError: the tokenizer cannot tell what it cut off.
    """
    if not tokenizer.is_fast:
        raise ModelError(f"{type(tokenizer).__name__}: only fast tokenizers (tokenizer.json) can be used")
    max_length = min(max_length, tokenizer.model_max_length)
    cells = text_cells(rows, [*text, *choices])
    limit = max_length * _CHARACTERS_PER_TOKEN
    pairs = [pair for row in cells for pair in _pairs([cell[:limit] for cell in row], len(choices))]
    ids, types, cut = [], [], []
    for start in range(0, len(pairs), AT_ONCE):
        found = _tokenized(pairs[start : start + AT_ONCE], tokenizer, max_length)
        ids += found[0]
        types += found[1]
        cut += found[2]
    width = max(1, len(choices))
    spans = [slice(start, start + width) for start in range(0, len(ids), width)]
    return Encoded(
        examples=[
            Example(index, tuple(ids[span]), tuple(types[span]) if types else None, label)
            for index, (span, label) in enumerate(zip(spans, labels, strict=True))
        ],
        num_truncated=sum(
            any(cut[span]) or any(len(cell) > limit for cell in row) for span, row in zip(spans, cells, strict=True)
        ),
        num_empty=sum(not all(cell.strip() for cell in row) for row in cells),
        num_tokens=sum(map(len, ids)),
    )


def _tokenized(
    pairs: Sequence[tuple[str, str | None]], tokenizer: Any, max_length: int
) -> tuple[list[list[int]], list[list[int]], list[bool]]:
    """(token ids, their types if the tokenizer tells them, whether it was cut) of each text or pair."""
    firsts = [first for first, _ in pairs]
    seconds = [second for _, second in pairs if second is not None]
    encoded = tokenizer(
        firsts, seconds or None, truncation="longest_first", max_length=max_length, return_attention_mask=False
    )
    cut = [bool(encoding.overflowing) for encoding in encoded.encodings]
    return encoded["input_ids"], encoded.get("token_type_ids", []), cut


def _pairs(cells: Sequence[str], num_choices: int) -> list[tuple[str, str | None]]:
    if not num_choices:
        return [(cells[0], cells[1] if len(cells) == 2 else None)]
    context = " ".join(cells[:-num_choices])
    return [(context, choice) for choice in cells[-num_choices:]]


def text_cells(rows: Rows, entries: Sequence[str]) -> list[list[str]]:
    """Text of every entry in every row.

    Raises:
        DataError: a column is missing, or a cell is no text; names the row.
    """
    columns = [column for entry in entries for column in columns_of(entry)]
    for column in columns:
        if column not in rows.columns:
            raise unknown(rows.source or rows.where(0), "column (task.text)", column, rows.columns)
    cells = []
    for index, row in enumerate(rows):
        texts = {column: cell_text(row, column, "task.text", rows.where(index)) for column in columns}
        cells.append([_rendered(entry, texts) for entry in entries])
    return cells


def _rendered(entry: str, texts: Mapping[str, str]) -> str:
    # Not str.format: a template may come with somebody's run, and format reads attributes.
    return texts[entry] if entry in texts else _FIELD.sub(lambda field: texts[field[1]], entry)


def padded(sequences: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """(sequences, longest), int64, filled up with `value` on the right."""
    import torch

    longest = max(map(len, sequences))
    return torch.tensor([[*sequence, *[value] * (longest - len(sequence))] for sequence in sequences])
