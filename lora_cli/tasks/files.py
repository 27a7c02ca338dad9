"""Records in files: CSV, TSV, JSON lines, plain text, Parquet. Knows bytes and lines, nothing of splits or tasks."""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lora_cli.disk import shown
from lora_cli.errors import DataError, printable

__all__ = ["EXTENSIONS", "Record", "read_records", "read_stdin", "separator", "shown"]

Record = tuple[int, dict[str, Any]]
"""Number of the line (of the row, in Parquet) counted from 1, and its cells by column."""

EXTENSIONS = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_MAX_LINE = 64 * 2**20


def separator(path: str | Path) -> str:
    """What stands between a file's name and a record's number in messages: data.csv:12, data.parquet row 12."""
    return " row " if Path(path).suffix.lower() == ".parquet" else ":"


def read_records(path: str | Path, *, column: str = "text") -> Iterator[Record]:
    """The records of a file, lazily. Lines of a .txt file are given as `column`.

    Text is strict UTF-8 (a byte order mark and CRLF are accepted), cells of CSV and TSV are text as they stand
    (None, NA and nothing are words like any other), and every record of them has every column.

    Raises:
        DataError: no regular file, another extension, nothing in it, or a line that cannot be read (named).
    """
    path, suffix = Path(path), Path(path).suffix.lower()
    _check_readable(path)
    if suffix not in EXTENSIONS:
        raise DataError(shown(path), f"unknown kind of file '{printable(suffix, 20)}'; known: {', '.join(EXTENSIONS)}")
    return _not_empty(_parquet(path) if suffix == ".parquet" else _text_file(path, suffix, column), shown(path))


def read_stdin(stdin: BinaryIO | None = None, *, column: str = "text") -> Iterator[Record]:
    """The records of standard input: JSON objects if the first non-blank line begins with {, else lines of text."""
    lines = _decoded(stdin or sys.stdin.buffer, "stdin")
    seen: list[str] = []
    for line in lines:
        seen.append(line)
        if line.strip():
            break
    suffix = ".jsonl" if seen and seen[-1].lstrip().startswith("{") else ".txt"
    return _not_empty(_parsed(itertools.chain(seen, lines), suffix, column, "stdin"), "stdin")


def _check_readable(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise DataError(shown(path), "no such file") from None
    except (OSError, ValueError) as error:
        raise DataError(shown(path), f"cannot be opened: {printable(error)}") from error
    if stat.S_ISDIR(mode):
        raise DataError(shown(path), f"a folder, not a file; known files: {', '.join(EXTENSIONS)}")
    if not stat.S_ISREG(mode):
        raise DataError(shown(path), "a pipe or a device, not a regular file")


def _not_empty(records: Iterator[Record], name: str) -> Iterator[Record]:
    first = next(records, None)
    if first is None:
        raise DataError(name, "empty: no rows")
    return itertools.chain([first], records)


def _text_file(path: Path, suffix: str, column: str) -> Iterator[Record]:
    try:
        with path.open("rb") as file:
            yield from _parsed(_decoded(file, shown(path)), suffix, column, shown(path))
    except OSError as error:
        raise DataError(shown(path), f"cannot be read: {error.strerror}") from error


def _parsed(lines: Iterator[str], suffix: str, column: str, name: str) -> Iterator[Record]:
    if suffix == ".jsonl":
        return _json_lines(lines, name)
    if suffix == ".txt":
        return ((number, {column: line.removesuffix("\n")}) for number, line in enumerate(lines, 1))
    return _table(lines, _DELIMITERS[suffix], name)


def _decoded(file: BinaryIO, name: str) -> Iterator[str]:
    """Lines of strict UTF-8 that end in a bare newline, whatever the file's own line ends."""
    for number in itertools.count(1):
        raw = file.readline(_MAX_LINE + 1)
        if not raw:
            return
        if len(raw) > _MAX_LINE:
            raise DataError(f"{name}:{number}", f"a line longer than {_MAX_LINE // 2**20} MiB")
        if number == 1:
            if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise DataError(f"{name}:1", "byte 1: the file is UTF-16; save it as UTF-8")
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if b"\0" in raw:
            at = raw.index(b"\0") + 1
            raise DataError(f"{name}:{number}", f"byte {at} of the line is NUL: not text in UTF-8 (UTF-16?)")
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            what = f"byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is not UTF-8"
            raise DataError(f"{name}:{number}", f"{what}; save the file as UTF-8") from error
        yield line[:-2] + "\n" if line.endswith("\r\n") else line


def _json_lines(lines: Iterable[str], name: str) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except RecursionError:
            raise DataError(f"{name}:{number}", "JSON nested too deeply") from None
        except ValueError as error:
            raise DataError(f"{name}:{number}", f"not JSON: {printable(error)}") from error
        if not isinstance(row, dict):
            raise DataError(f"{name}:{number}", f"a JSON {_json_type(row)}; wanted one object, {{...}}, a line")
        yield number, row


def _json_type(value: object) -> str:
    return "list" if isinstance(value, list) else "null" if value is None else type(value).__name__


def _table(lines: Iterable[str], delimiter: str, name: str) -> Iterator[Record]:
    # The module's limit of 128 KiB a cell is global; long documents are legitimate, and lines are capped above.
    csv.field_size_limit(_MAX_LINE)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    for number, cells in _cells(reader, name):
        if header is None:
            header = cells
            _check_header(header, f"{name}:{number}")
        elif len(cells) != len(header):
            raise DataError(f"{name}:{number}", f"{len(cells)} cells, but the header has {len(header)}")
        else:
            yield number, dict(zip(header, cells, strict=True))


def _cells(reader: Any, name: str) -> Iterator[tuple[int, list[str]]]:
    """Line on which each row begins (a quoted cell may hold line ends), and its cells; blank lines are left out."""
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = 'write a quote inside a quoted cell as ""'
            raise DataError(f"{name}:{number}", f"broken row: {printable(error)}; {hint}") from error
        if cells:
            yield number, cells


def _check_header(names: Sequence[str], where: str) -> None:
    for position, name in enumerate(names, 1):
        if not name.strip():
            raise DataError(where, f"column {position} of the header has no name")
        if name in names[: position - 1]:
            raise DataError(where, f"column '{printable(name, 40)}' stands twice in the header")


def _parquet(path: Path) -> Iterator[Record]:
    # Straight through pyarrow: a third of the start-up time of `datasets`, and no second copy in its cache.
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(str(path)) as file:
            _check_header(file.schema_arrow.names, shown(path))
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from enumerate(rows, 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(shown(path), f"not a readable Parquet file: {printable(error, 160)}") from error
