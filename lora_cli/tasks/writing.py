"""Answers of `lora infer` as a file: JSON lines, CSV or Parquet, whole or not there."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_cli.disk import atomic_file, defused
from lora_cli.errors import ConfigError

__all__ = ["check_format", "write_rows"]

_HALVES = "backslashreplace"
"""Half of a character pair, which JSON can hold but UTF-8 cannot, stays as JSON writes it."""


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `rows` in the format that the name of `path` ends with.

    Raises:
        ConfigError: no such format. Nothing has been read from `rows` by then.
    """
    check_format(path)
    with atomic_file(path) as temporary:
        _WRITERS[path.suffix](temporary, rows)


def check_format(path: Path) -> None:
    """Refuse a file that `write_rows` cannot write.

    Raises:
        ConfigError: its ending names no format, or it is a folder.
    """
    if path.suffix not in _WRITERS:
        raise ConfigError("output", path, f"ends with one of {', '.join(_WRITERS)}")
    if path.is_dir():
        raise ConfigError("output", path, "is a folder; a file is written")


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", errors=_HALVES) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", errors=_HALVES, newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for row in map(_flat, rows):
            if writer is None:
                writer = csv.DictWriter(file, list(row))
                writer.writerow({name: defused(name) for name in row})
            writer.writerow({name: _cell(value) for name, value in row.items()})


def _write_parquet(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist([_flat(row) for row in rows]), path)


_WRITERS: dict[str, Callable[[Path, Iterable[Mapping[str, Any]]], None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Probabilities as columns of their own, p(label)."""
    flat = {name: cell for name, cell in row.items() if name != "probabilities"}
    return flat | {f"p({label})": value for label, value in row.get("probabilities", {}).items()}


def _cell(value: Any) -> Any:
    """A value as a cell of CSV: what is no text or number as JSON, a formula defused."""
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    return defused(value)
