"""Rows of a task's splits, wherever they come from. Opens data; knows nothing of what is learnt from it."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_cli.errors import DataError, listed, nearest, printable
from lora_cli.tasks.files import read_records, read_stdin, separator, shown

__all__ = ["Rows", "overlap", "read_file", "repeats", "stream", "unknown"]

_MAX_MESSAGE = 275


class Rows:
    """A list of rows, each a dict from column to cell, which knows where every row stands.

    `numbers` are the rows' lines or row numbers in `source`; by default they are counted from 1.
    `num_unlabelled` counts rows left out because the data set marks them as having no gold label.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        *,
        source: str,
        numbers: Sequence[object] | None = None,
        separator: str = " row ",
        num_unlabelled: int = 0,
    ) -> None:
        self._rows, self.source, self._separator = rows, source, separator
        self._numbers = range(1, len(rows) + 1) if numbers is None else numbers
        self.num_unlabelled = num_unlabelled

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)

    def where(self, index: int) -> str:
        """The row's place for messages, such as file.csv:12."""
        return f"{self.source}{self._separator}{self._numbers[index]}"

    def select(self, indices: Iterable[int]) -> Rows:
        """The rows at `indices`, in that order."""
        chosen = list(indices)
        return Rows(
            [self._rows[index] for index in chosen],
            source=self.source,
            numbers=[self._numbers[index] for index in chosen],
            separator=self._separator,
            num_unlabelled=self.num_unlabelled,
        )

    def replaced(self, rows: Sequence[dict[str, Any]]) -> Rows:
        """Other cells at the same places, row by row."""
        return Rows(
            rows,
            source=self.source,
            numbers=self._numbers,
            separator=self._separator,
            num_unlabelled=self.num_unlabelled,
        )

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """Columns that at least one row has, in order of appearance."""
        return tuple(dict.fromkeys(column for row in self._rows for column in row))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the rows' content and order; file names, formats and the order of columns do not count."""
        digest = hashlib.sha256()
        encode = json.JSONEncoder(sort_keys=True, default=str).encode
        for row in self._rows:
            digest.update(encode(row).encode() + b"\n")
        return digest.hexdigest()


def read_file(path: str | Path) -> Rows:
    """All rows of a .csv, .tsv, .jsonl, .parquet or .txt file (one text a line, column `text`).

    Raises:
        DataError: the file is missing, empty or broken; names the line.
    """
    numbers, rows = zip(*read_records(path), strict=True)
    return Rows(rows, source=shown(path), numbers=numbers, separator=separator(path))


def stream(path: str | Path, *, column: str = "text") -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of each row of a file, or of standard input for "-", read as they are taken.

    Bare lines of text are given as `column`. Standard input holds JSON objects if its first non-blank line begins
    with {, else lines of text.

    Raises:
        DataError: as `read_file`.
    """
    name, between = ("stdin", ":") if str(path) == "-" else (shown(path), separator(path))
    records = read_stdin(column=column) if str(path) == "-" else read_records(path, column=column)
    return ((f"{name}{between}{number}", row) for number, row in records)


def overlap(a: Iterable[dict[str, Any]], b: Iterable[dict[str, Any]], columns: Sequence[str]) -> int:
    """Number of rows of `b` whose cells in `columns` all stand in a row of `a` as well."""
    known = {_key(row, columns) for row in a}
    return sum(_key(row, columns) in known for row in b)


def repeats(rows: Rows, columns: Sequence[str]) -> int:
    """Number of rows whose cells in `columns` already stood in an earlier row."""
    return len(rows) - len({_key(row, columns) for row in rows})


def unknown(where: object, what: str, name: object, options: Iterable[str]) -> DataError:
    """The error for a name that data does not have: `what` and the name, the nearest one, and what there is."""
    names = list(options)
    near = nearest(str(name), names)
    hint = f" Did you mean '{printable(near, 40)}'?" if near else ""
    problem = f"no {what} '{printable(name, 40)}'.{hint} There are: "
    return DataError(where, problem + listed(names, max(40, _MAX_MESSAGE - len(str(where)) - len(problem))))


def _key(row: dict[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(row.get(column)) for column in columns)
