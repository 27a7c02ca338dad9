"""The end of a sweep as a person sees it: what failed and why, the leaderboard, what it allows to say."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from lora_cli.comparison_view import chance, seconds, size
from lora_cli.disk import write_atomic
from lora_cli.errors import printable
from lora_cli.fitted_table import fitted_table
from lora_cli.runs.leaderboard import Board, Configuration, boards, write_leaderboard
from lora_cli.runs.sweep import DONE, SweepJob, read_jobs, write_command
from lora_cli.screen import Screen, count, significant
from lora_cli.sweep_page import sweep_page

__all__ = ["conclude"]

_MAX_SENTENCES = 8
_SPARE = ("on disk", "memory", "time", "trains")
"""Columns that a narrow terminal can do without."""
_SPREAD = "; ± half of the 95 % interval over seeds"
_TESTS = "; p: paired bootstrap against the first; * no other is as good, as small and as fast"


def conclude(folder: Path, command: str, screen: Screen) -> bool:
    """Show how the sweep in `folder` ended and write its leaderboard and page there.

    `command` is the line that made it. Returns whether every job is finished.
    """
    jobs = read_jobs(folder)
    if jobs:
        write_command(folder, command)
    found = boards(jobs, screen.warning)
    if found:
        write_leaderboard(folder, found)
        write_atomic(folder / "report.html", sweep_page(folder, jobs, found))
    for board in found:
        screen.show(_leaderboard(board, several=len(found) > 1, width=screen.width))
        screen.line(_legend(board))
        said = board.sentences
        screen.line("".join(f"\n{sentence}" for sentence in said[:_MAX_SENTENCES]))
        if len(said) > _MAX_SENTENCES:
            screen.line(f"and {len(said) - _MAX_SENTENCES} more in leaderboard.json")
    if found:
        screen.line(f"\n{folder}\nleaderboard.json, leaderboard.csv, report.html")
    missing = [job for job in jobs if job.status not in DONE]
    if missing:
        done = len(jobs) - len(missing)
        screen.warning(f"{len(missing)} of {len(jobs)} jobs have not finished; {_remedy(missing)}")
        screen.note(_missing(missing, set.intersection(*(set(job.overrides) for job in jobs))))
        if done and not found:
            screen.warning("no finished run can be read")
    return not missing


def _leaderboard(board: Board, *, several: bool, width: int) -> Table:
    named = f"{board.task}: configuration" if several else "configuration"
    costs = [row.costs for row in board.rows]
    columns = {
        "": [f"{rank}{' *' if row.on_front else ''}" for rank, row in enumerate(board.rows, 1)],
        named: [printable(name, 80) or "as it is" for name in board.names],
        board.metric: [_value(row) for row in board.rows],
        "seeds": [str(len(row.values)) for row in board.rows],
        "p": ["", *(chance(row.p) for row in board.rows[1:])],
        "trains": [count(each["trainable"]) for each in costs],
        "on disk": [size(each["adapter_bytes"]) for each in costs],
        "memory": [size(each["peak_memory_mib"] * 2**20) for each in costs],
        "time": [seconds(each["train_s"]) for each in costs],
    }
    styles = ["bold", *[""] * (len(board.rows) - 1)]
    return fitted_table(columns, width, folds=named, left=[""], spare=_SPARE, styles=styles)


def _legend(board: Board) -> str:
    """What the table's figures are."""
    spread = _SPREAD if any(row.interval is not None for row in board.rows) else ""
    return f"{board.split}/{board.metric}{spread}{_TESTS if len(board.rows) > 1 else ''}"


def _value(row: Configuration) -> str:
    if row.interval is None or row.mean is None:
        return significant(row.mean)
    low, high = row.interval
    return f"{significant(row.mean)} ± {significant((high - low) / 2)}"


def _remedy(missing: Sequence[SweepJob]) -> str:
    valid = [job for job in missing if not job.is_invalid]
    if not valid:
        return "their configurations are not valid"
    return f"the same command trains {'these' if len(valid) == len(missing) else f'the {len(valid)} valid ones'} only"


def _missing(jobs: Sequence[SweepJob], shared: Collection[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for head in ("job", "configuration", "why"):
        table.add_column(head, justify="right" if head == "job" else "left")
    for job in jobs:
        why = job.error or job.status
        table.add_row(
            str(job.number),
            escape(printable(" ".join(word for word in job.overrides if word not in shared), 60)),
            escape(printable(why, 200)),
        )
    return table
