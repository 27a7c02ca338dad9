"""The end of a sweep on terminals of several widths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_cli.runs.sweep import SweepJob, record
from lora_cli.screen import Screen
from lora_cli.sweep_view import conclude
from runs.test_leaderboard import make_run, sweep


@pytest.fixture
def shown(scratch: Path, capsys, monkeypatch):
    """What a terminal of a width says of a sweep whose jobs have these words."""

    def conclude_with(*jobs: str, columns: int) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        for number, words in enumerate(jobs):
            metric = "f1" if "task=plays" in words else "accuracy"
            path = make_run(scratch / str(number), right=0.9 - 0.1 * number, seed=number, metric=metric)
            record(Path("sweep"), SweepJob(number, tuple(words.split()), path))
        assert conclude(Path("sweep"), "lora train -m", Screen())
        return [line.rstrip() for line in capsys.readouterr().out.splitlines() if line]

    return conclude_with


DRAWN = ("task=films lora.r=16 train.lr=0.007098936257405904", "task=films lora.r=8 train.lr=0.0001")


def test_a_wide_terminal_has_all_columns_and_rounded_values(shown) -> None:
    head, first, second, *_ = shown(*DRAWN, columns=120)
    assert head.split()[0] == "configuration"
    assert head.split()[-6:] == ["p", "trains", "on", "disk", "memory", "time"]
    assert "lora.r=16 train.lr=0.007099 " in first
    assert "lora.r=8 train.lr=0.0001 " in second
    rows = json.loads(Path("sweep/leaderboard.json").read_text())["boards"][0]["configurations"]
    assert rows[0]["title"] == "lora.r=16 train.lr=0.007098936257405904", "files keep values whole"


@pytest.mark.parametrize("columns", [80, 60, 50])
def test_a_narrow_one_parts_no_key_and_loses_costs_first(shown, columns: int) -> None:
    lines = shown(*DRAWN, columns=columns)
    table = lines[: next(number for number, line in enumerate(lines) if line.startswith("validation/accuracy"))]
    assert max(map(len, table)) <= columns
    words = " ".join(table).split()
    assert {"configuration", "accuracy", "seeds", "p", "lora.r=16", "train.lr=0.007099", "lora.r=8"} <= set(words)


def test_what_all_rows_of_a_board_share_is_left_out(shown) -> None:
    jobs = [f"task={task} lora.r={r}" for task in ("films", "plays") for r in (2, 4)]
    lines = shown(*jobs, columns=120)
    assert sum("lora.r=2" in line for line in lines) >= 2
    assert not any("task=" in line for line in lines)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_line_below_the_table_says_what_its_figures_are(seeds: int, scratch: Path, capsys) -> None:
    for job in [job for job in sweep(scratch, r2=0.6, r4=0.9) if job.number % 3 < seeds]:
        record(scratch, job)
    assert conclude(scratch, "lora train -m lora.r=2,4", Screen())
    shown = capsys.readouterr().out
    assert "p: paired bootstrap against the first" in shown
    assert ("± half of the 95 % interval over seeds" in shown) == ("±" in shown) == (seeds > 1)
