"""Requests to classify as rows, and the answers as they are told. Knows no HTTP but refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_cli.errors import ConfigError, listed, nearest, printable
from lora_cli.serving.adapters import Entry
from lora_cli.serving.gate import Refusal
from lora_cli.serving.models import row_of
from lora_cli.serving.schemas import MAX_NAME, ClassifyRequest

__all__ = ["label_rows_of", "rounded", "texts_of"]


def texts_of(body: ClassifyRequest) -> Iterator[str]:
    """All that is to be read, names of columns included."""
    for text in [body.input] if isinstance(body.input, str) else body.input:
        if isinstance(text, str):
            yield text
        else:
            yield from text
            yield from text.values() if isinstance(text, dict) else ()


def label_rows_of(entry: Entry, body: ClassifyRequest) -> list[dict[str, Any]]:
    """The rows that the adapter's task reads.

    Raises:
        Refusal: the adapter reads other columns.
    """
    if isinstance(body.input, str):
        return [_row(entry, body.input, "input")]
    return [_row(entry, text, f"input.{place}") for place, text in enumerate(body.input)]


def rounded(answer: dict[str, Any]) -> dict[str, Any]:
    """Probabilities to six digits, as `lora infer` writes them."""
    found = answer.get("probabilities")
    return answer if found is None else {**answer, "probabilities": {name: round(p, 6) for name, p in found.items()}}


def _row(entry: Entry, text: Any, where: str) -> dict[str, Any]:
    columns = list(entry.task.columns)
    if isinstance(text, dict):
        _check_columns(text, columns, where)
    try:
        return row_of(entry, text)
    except ConfigError as error:
        raise Refusal(422, f"{where}: {error.allowed}", param=where) from error


def _check_columns(text: dict[str, str], columns: list[str], where: str) -> None:
    for name in text:
        if name not in columns:
            near = nearest(name[:MAX_NAME], columns)
            hint = f" Did you mean {near}?" if near else ""
            said = f"{where}: no column '{printable(name, 40)}'.{hint} There are: {listed(columns)}"
            raise Refusal(422, said, param=where)
    for name in columns:
        if name not in text:
            raise Refusal(422, f"{where}: without {name}; this adapter reads {listed(columns)}", param=where)
