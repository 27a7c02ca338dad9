"""The predictions that a run has kept, read back. They may be anybody's: plain rows of a bounded file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_cli.disk import open_plain
from lora_cli.errors import RunError, printable
from lora_cli.runs.directory import RunDirectory
from lora_cli.runs.statistics import Answers

__all__ = ["as_answers", "read_answers", "read_predictions"]

_MAX_BYTES = 1 << 29


def read_predictions(run: RunDirectory, split: str) -> list[dict[str, Any]]:
    """The rows of predictions/<split>.jsonl, in the order of the data.

    Raises:
        RunError: they are missing, or not readable.
    """
    file = run.path / "predictions" / f"{split}.jsonl"
    with open_plain(file, RunError, limit=_MAX_BYTES) as lines:
        try:
            rows = [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as error:
            raise RunError(f"{file}: not readable as JSON lines ({printable(error, 80)})") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise RunError(f"{file}: holds no predictions")
    return rows


def as_answers(rows: Sequence[Mapping[str, Any]], labels: Sequence[str] | None) -> Answers | None:
    """Predictions as numbers: ids of `labels`, or values of a regression; None if they are neither."""
    ids = None if labels is None else {label: number for number, label in enumerate(labels)}
    try:
        columns = [
            np.asarray([float(row[name]) if ids is None else ids[row[name]] for row in rows])
            for name in ("label", "prediction")
        ]
    except (KeyError, TypeError, ValueError):
        return None
    return Answers(*columns)


def read_answers(run: RunDirectory, split: str, labels: Sequence[str] | None) -> Answers | None:
    """The kept predictions as numbers; None, with a warning if they are damaged, if they cannot be used."""
    try:
        return as_answers(read_predictions(run, split), labels)
    except RunError as error:
        warnings.warn(f"{error}; compared without its predictions", stacklevel=2)
        return None
