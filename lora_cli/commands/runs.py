"""lora runs: the runs under runs/ as a table, or as JSON lines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from lora_cli.comparison_view import seconds
from lora_cli.errors import printable
from lora_cli.runs.registry import all_runs
from lora_cli.runs.summary import Summary, summary
from lora_cli.screen import Screen, count, significant
from lora_cli.spec import RunsRun

__all__ = ["run"]

_WIDE = 110
"""Columns of a terminal that has room for task and model."""


def run(spec: RunsRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> None:
    """Print the runs that `spec` asks for; what cannot be read is listed as damaged."""
    screen = Screen()
    known = [summary(each) for each in all_runs()]
    found = sorted((each for each in known if _is_wanted(each, spec)), key=lambda each: each.rank(spec.sort))
    shown = found[: spec.limit] if spec.limit else found
    if spec.json:
        for each in shown:
            print(json.dumps(dataclasses.asdict(each)))
        return
    if not shown:
        screen.warning("no run is like that" if known else "there are no runs under runs/ yet; lora train makes one")
        return
    # The folder's name mostly says what they are.
    screen.show(_table(shown, with_task=screen.width >= _WIDE))
    if len(shown) < len(found):
        screen.line(f"\n{len(shown)} of {len(found)} runs; limit=0 shows all")


def _is_wanted(each: Summary, spec: RunsRun) -> bool:
    where = spec.where
    pairs = ((where.task, each.task), (where.model, each.model), (where.status, each.status))
    return all(wanted in (None, found) for wanted, found in pairs) and (where.name or "") in each.path


def _table(runs: Sequence[Summary], *, with_task: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    for head in ("task", "model", "method") if with_task else ("method",):
        table.add_column(head, overflow="fold")
    for head in ("metric", "trains", "time"):
        table.add_column(head, justify="right", no_wrap=True)
    # What is not finished stands out where nearly everything is.
    table.add_column("" if all(each.status == "finished" for each in runs) else "status", no_wrap=True)
    for each in runs:
        known = (each.task, each.model, each.method) if with_task else (each.method,)
        metric = f"{(each.metric or '').rpartition('/')[2]} {significant(each.value)}"
        table.add_row(
            escape(printable(each.path.removeprefix("runs/"), 90)),
            *(escape(printable(text or "–", 30)) for text in known),
            metric if each.value is not None else "–",
            "–" if each.parameters is None else count(each.parameters),
            "–" if each.train_s is None else seconds(each.train_s),
            "" if each.status == "finished" else each.status,
            style="" if each.status == "finished" else "dim",
        )
    return table
