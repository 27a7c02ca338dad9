"""lora runs: the runs under runs/ as a table, or as JSON lines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from lora_cli.comparison_view import seconds
from lora_cli.errors import printable
from lora_cli.fitted_table import fitted_table
from lora_cli.runs.directory import read_saved_config, result_keys
from lora_cli.runs.registry import all_runs
from lora_cli.runs.summary import Summary, summary
from lora_cli.screen import Screen, count, significant
from lora_cli.spec import RunsRun
from lora_cli.words import shortened

__all__ = ["run"]

_DIFFERS = "differs"
_SPARE = ("model", "task", "trains", "time")
"""Columns that a narrow terminal can do without."""


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
    screen.show(_table(shown, screen.width))
    if len(shown) < len(found):
        screen.line(f"\n{len(shown)} of {len(found)} runs; limit=0 shows all")


def _is_wanted(each: Summary, spec: RunsRun) -> bool:
    where = spec.where
    pairs = ((where.task, each.task), (where.model, each.model), (where.status, each.status))
    return all(wanted in (None, found) for wanted, found in pairs) and (where.name or "") in each.path


def _table(runs: Sequence[Summary], width: int) -> Table:
    differing = _differing(runs)
    texts = {
        "run": [printable(each.path.removeprefix("runs/"), 90) for each in runs],
        # The folder's name mostly says what they are.
        "task": [printable(each.task or "–", 30) for each in runs],
        "model": [printable(each.model or "–", 30) for each in runs],
        "method": [printable(each.method or "–", 30) for each in runs],
    }
    if differing:
        del texts["task"], texts["model"]
    figures = {
        "metric": [_metric(each) for each in runs],
        "trains": ["–" if each.parameters is None else count(each.parameters) for each in runs],
        "time": ["–" if each.train_s is None else seconds(each.train_s) for each in runs],
    }
    # What is not finished stands out where nearly everything is.
    status = ["" if each.status == "finished" else each.status for each in runs]
    state = {"status": status} if any(status) else {}
    columns = texts | ({_DIFFERS: differing} if differing else {}) | figures | state
    styles = ["dim" if text else "" for text in status]
    return fitted_table(columns, width, folds=_DIFFERS, left=[*texts, "status"], spare=_SPARE, styles=styles)


def _metric(each: Summary) -> str:
    return "–" if each.value is None else f"{(each.metric or '').rpartition('/')[2]} {significant(each.value)}"


def _differing(runs: Sequence[Summary]) -> list[str]:
    """Of runs of one task and model the keys in which they differ, besides what the method says; [] of others."""
    if len({(each.task, each.model) for each in runs}) > 1:
        return []
    settings = [{} if each.status == "damaged" else result_keys(read_saved_config(Path(each.path))) for each in runs]
    keys = [
        key for key in dict.fromkeys(key for each in settings for key in each) if key not in ("lora.variant", "lora.r")
    ]
    keys = [key for key in keys if len({str(each.get(key)) for each in settings}) > 1]
    told = [[f"{key.rpartition('.')[2]}={shortened(each[key])}" for key in keys if key in each] for each in settings]
    return [printable(" ".join(words), 80) for words in told] if keys else []
