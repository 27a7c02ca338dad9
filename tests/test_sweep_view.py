"""The end of a sweep on the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_cli.runs.sweep import record
from lora_cli.screen import Screen
from lora_cli.sweep_view import conclude
from runs.test_leaderboard import sweep


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_line_below_the_table_says_what_its_figures_are(seeds: int, scratch: Path, capsys) -> None:
    for job in [job for job in sweep(scratch, r2=0.6, r4=0.9) if job.number % 3 < seeds]:
        record(scratch, job)
    assert conclude(scratch, "lora train -m lora.r=2,4", Screen())
    shown = capsys.readouterr().out
    assert "p: paired bootstrap against the first" in shown
    assert ("± half of the 95 % interval over seeds" in shown) == ("±" in shown) == (seeds > 1)
