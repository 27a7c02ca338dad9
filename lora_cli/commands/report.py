"""lora report: a run or a sweep in, one HTML page out."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from lora_cli.disk import shown, write_atomic
from lora_cli.errors import ConfigError, RunError, printable
from lora_cli.report_page import curves, run_page
from lora_cli.runs.difference import read_metrics
from lora_cli.runs.directory import RunDirectory
from lora_cli.runs.leaderboard import Board, boards
from lora_cli.runs.predictions import read_predictions
from lora_cli.runs.registry import find_run, is_bare_adapter
from lora_cli.runs.sweep import find_sweep, read_jobs
from lora_cli.screen import Screen
from lora_cli.spec import ReportRun
from lora_cli.sweep_page import sweep_page
from lora_cli.terminal_plot import curve, places

__all__ = ["run"]


def run(spec: ReportRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> None:
    """Write the page that `spec` asks for, and say where it is.

    Raises:
        UserError: there is no such run or sweep, it is damaged, or the file would replace something else.
    """
    screen = Screen()
    sketches: Iterable[str]
    if spec.sweep is not None:
        folder = find_sweep(spec.sweep)
        jobs = read_jobs(folder)
        found = boards(jobs, screen.warning)
        if not found:
            raise RunError(f"{folder}: no finished run of the sweep can be read; there is nothing to report")
        text, sketches = sweep_page(folder, jobs, found), filter(None, map(_of_board, found))
    else:
        assert spec.run is not None
        folder = find_run(spec.run)
        if is_bare_adapter(folder):
            raise RunError(f"{folder}: an adapter without its run; there is nothing to report")
        RunDirectory(folder).check_plain()
        text = run_page(RunDirectory(folder), spec.examples)
        sketches = _of_run(RunDirectory(folder))
        for fault in _damage(RunDirectory(folder)):
            screen.warning(f"{fault}; the page is without it")
    target = Path(spec.output) if spec.output else folder / "report.html"
    if target.exists() and not target.read_bytes().startswith(b"<!doctype html>"):
        raise ConfigError("output", str(target), "holds something else than a page; choose another file")
    try:
        write_atomic(target, text)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise RunError(f"{shown(target)}: {error.strerror}; output=FILE writes it elsewhere") from error
    screen.line(str(target))
    for plot in sketches if screen.can_sketch else ():
        screen.sketch(f"\n{plot}")


def _of_run(run: RunDirectory) -> Iterator[str]:
    """What was noted more than once while it trained, over the steps."""
    for name, points in curves(run).items():
        if len(points) > 1:
            yield curve(printable(name, 60), points)


def _of_board(board: Board) -> str | None:
    """Its configurations by rank, where the metric and the parameters that train put them; None of a single one."""
    scored = [
        (row.costs["trainable"], row.mean) for row in board.rows if row.mean is not None and row.costs["trainable"]
    ]
    what = f"{board.task}: {board.split}/{board.metric} against parameters that train, by rank"
    return places(printable(what, 120), scored) if len(scored) > 1 else None


def _damage(run: RunDirectory) -> Iterator[str]:
    """What is wrong with the records of a run that has been scored."""
    splits = run.facts().get("metrics", {})
    reading = [partial(read_metrics, run.path), *(partial(read_predictions, run, split) for split in splits)]
    for read in reading if splits else ():
        try:
            read()
        except RunError as error:
            yield str(error)
