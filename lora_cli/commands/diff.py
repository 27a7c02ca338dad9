"""lora diff: two runs beside each other, and only what they do not share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from lora_cli.errors import RunError, printable
from lora_cli.runs.difference import differing_versions, first_difference, read_metrics
from lora_cli.runs.directory import RunDirectory, read_saved_config, result_keys
from lora_cli.runs.predictions import as_answers, read_predictions
from lora_cli.runs.registry import find_run, is_bare_adapter
from lora_cli.runs.statistics import RESAMPLED, mcnemar, paired_bootstrap
from lora_cli.screen import Screen, significant
from lora_cli.spec import DiffRun

__all__ = ["run"]

Rows = Sequence[Mapping[str, Any]]


def run(spec: DiffRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> None:
    """Print what differs; nothing is written.

    Raises:
        UserError: one of them is no run, or is damaged.
    """
    screen = Screen()
    ours, theirs = (RunDirectory(find_run(name)) for name in (spec.run, spec.other))
    for each in (ours, theirs):
        if is_bare_adapter(each.path):
            raise RunError(f"{each.path}: an adapter without its run; there is nothing to compare it by")
        each.check_plain()
    # A damaged file is found before half of an answer has been given.
    apart = f"\n{_data(ours, theirs)}\n{_training(ours, theirs)}\n{_versions(ours, theirs)}"
    screen.show(_configuration(ours, theirs), _metrics(ours, theirs))
    screen.line(apart)
    for split in sorted(ours.facts().get("metrics", {}).keys() & theirs.facts().get("metrics", {}).keys()):
        try:
            _predictions(ours, theirs, split, spec.examples, screen)
        except RunError as error:
            screen.warning(f"{error}; compared without predictions of {split}")


def _configuration(ours: RunDirectory, theirs: RunDirectory) -> Table:
    keys = [result_keys(read_saved_config(each.path)) for each in (ours, theirs)]
    table = _table("configuration", ours, theirs)
    for name in [name for name in keys[0] | keys[1] if keys[0].get(name) != keys[1].get(name)]:
        table.add_row(escape(name), *(escape(printable(each.get(name), 60)) for each in keys))
    if not table.row_count:
        table.add_row("equal", "", "")
    return table


def _metrics(ours: RunDirectory, theirs: RunDirectory) -> Table:
    table = _table("", ours, theirs)
    table.add_column("difference", justify="right")
    figures = [_figures(each.facts()) for each in (ours, theirs)]
    for name in figures[0] | figures[1]:
        left, right = (each.get(name) for each in figures)
        apart = "" if left is None or right is None else "equal" if left == right else f"{_shown(left - right, '+')}"
        table.add_row(escape(name), _shown(left), _shown(right), apart)
    return table


def _shown(value: float | None, sign: str = "") -> str:
    if isinstance(value, int):
        return f"{value:{sign},}"
    return f"{sign if (value or 0) > 0 else ''}{significant(value, 4)}"


def _figures(facts: Mapping[str, Any]) -> dict[str, float | None]:
    found = {
        f"{split}/{name}": value for split, each in facts.get("metrics", {}).items() for name, value in each.items()
    }
    found["trainable parameters"] = facts.get("parameters", {}).get("trainable")
    cost = facts.get("cost", {})
    return found | {text: cost.get(name) for name, text in (("train_s", "training, s"), ("rows_per_s", "rows/s"))}


def _data(ours: RunDirectory, theirs: RunDirectory) -> str:
    parts = [each.facts().get("data", {}) for each in (ours, theirs)]
    other = [
        split
        for split in sorted(parts[0].keys() | parts[1].keys())
        if parts[0].get(split, {}).get("fingerprint") != parts[1].get(split, {}).get("fingerprint")
    ]
    return f"data       {', '.join(other)}: other rows" if other else "data       the same rows"


def _training(ours: RunDirectory, theirs: RunDirectory) -> str:
    part = first_difference(read_metrics(ours.path), read_metrics(theirs.path))
    if part is None:
        return "training   equal to the last bit at every step"
    return (
        f"training   parts at step {part.step}: {part.name} {significant(part.ours, 6)}, {significant(part.theirs, 6)}"
    )


def _versions(ours: RunDirectory, theirs: RunDirectory) -> str:
    # What the second has and the first has not, read from left to right.
    other = [text.replace(", now ", " and ") for text in differing_versions(theirs.facts(), ours.facts())]
    return f"versions   {'; '.join(other) or 'equal, and the device too'}"


def _predictions(ours: RunDirectory, theirs: RunDirectory, split: str, examples: int, screen: Screen) -> None:
    """How many rows flipped, whether that can be chance, and some of them."""
    mine, other = (read_predictions(each, split) for each in (ours, theirs))
    if len(mine) != len(other) or any(a.get("label") != b.get("label") for a, b in zip(mine, other, strict=True)):
        screen.line(f"\n{split}: predictions of other rows, which cannot be put side by side")
        return
    pairs = list(zip(mine, other, strict=True))
    flipped = [(a, b) for a, b in pairs if _said(a) != _said(b)]
    screen.line(
        f"\n{split}: {len(flipped):,} of {len(pairs):,} predictions differ{_tests(ours, theirs, split, mine, other)}"
    )
    if not flipped or not examples:
        return
    table = _table("row", ours, theirs)
    table.add_column("label")
    for a, b in flipped[:examples]:
        cells = (a.get("index"), _said(a), _said(b), a.get("label", a.get("references")))
        table.add_row(*(escape(printable(cell, 60)) for cell in cells))
    screen.show(table)


def _said(row: Mapping[str, Any]) -> Any:
    return row.get("prediction")


def _tests(ours: RunDirectory, theirs: RunDirectory, split: str, mine: Rows, other: Rows) -> str:
    """Counts of who is right where the other is wrong, and p of the difference; "" where there is no test."""
    config = read_saved_config(ours.path)
    metric, labels = config["task"]["metrics"][0], ours.facts().get("labels")
    answers = [as_answers(rows, labels) for rows in (mine, other)]
    first, second = answers
    if metric not in RESAMPLED or first is None or second is None:
        return ""
    said = f"; {metric}: p = {paired_bootstrap(metric, [first], [second], paired=True):.2g} (paired bootstrap)"
    if labels is None:
        return said
    right, theirs_right = (each.predictions == each.references for each in (first, second))
    only, lost = int((right & ~theirs_right).sum()), int((~right & theirs_right).sum())
    return (
        f", {only:,} right only in the first, {lost:,} only in the second{said}, {mcnemar(first, second):.2g} (McNemar)"
    )


def _table(head: str, ours: RunDirectory, theirs: RunDirectory) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for name in (head, ours.path.name, theirs.path.name):
        table.add_column(escape(printable(name, 50)))
    return table
