"""Tables of several widths."""

from __future__ import annotations

import pytest

from lora_cli.fitted_table import fitted_table
from lora_cli.screen import Screen

COLUMNS = {
    "run": ["2026-11-29_sweep/0", "[b]"],
    "differs in": ["lr=0.002694 seed=1", "lr=0.1 seed=2"],
    "time": ["1s", "20s"],
}


@pytest.fixture
def shown(capsys, monkeypatch):
    """The lines of a table on a terminal of a width."""

    def show(width: int) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(width))
        table = fitted_table(COLUMNS, width, folds="differs in", left=["run"], spare=["time"], styles=["", "dim"])
        Screen().show(table)
        return [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]

    return show


def test_with_room_every_row_is_a_line(shown) -> None:
    assert shown(60) == [
        "run                 differs in          time",
        "2026-11-29_sweep/0  lr=0.002694 seed=1    1s",
        "[b]                 lr=0.1 seed=2        20s",
    ]


def test_with_less_the_folding_column_goes_on_between_words(shown) -> None:
    lines = shown(40)
    assert lines[1:3] == ["2026-11-29_sweep/0  lr=0.002694       1s", "                    seed=1"]


def test_with_little_what_can_be_spared_goes(shown) -> None:
    lines = shown(33)
    assert lines[0] == "run                 differs in"
    assert max(map(len, lines)) <= 33
