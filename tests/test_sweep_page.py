"""What the page of a sweep shows, of runs that are made of numbers."""

from __future__ import annotations

import re
from pathlib import Path

from lora_cli.runs.leaderboard import boards
from lora_cli.runs.sweep import SweepJob
from lora_cli.sweep_page import sweep_page
from runs.test_leaderboard import make_run
from test_page import parsed


def page_of(folder: Path, shares: dict[str, float], **facts: object) -> str:
    """The page of a job a word of `shares`, which finds that share of its rows."""
    jobs = []
    for number, (words, right) in enumerate(shares.items()):
        path = make_run(folder / str(number), right=right, seed=number, parameters=100 + number, **facts)
        jobs.append(SweepJob(number, tuple(words.split()), path))
    return sweep_page(folder, jobs, boards(jobs))


def heat_maps(html: str) -> list[list[list[str]]]:
    """The cells of each, row by row."""
    tables = re.findall(r'<table class="heat[^"]*">(.*?)</table>', html)
    return [[re.findall(r"<t[hd][^>]*>([^<]*)<", row) for row in table.split("</tr>")[:-1]] for table in tables]


def test_values_stand_in_the_order_of_their_size(scratch: Path) -> None:
    shares = {
        f"lora.r={r} train.lr={lr}": 0.5 + float(lr) * 100 + r / 1000 for r in (2, 32, 8) for lr in ("3e-3", "1e-4")
    }
    ((head, *rows),) = heat_maps(page_of(scratch, shares))
    assert head == ["", "train.lr=1e-4", "train.lr=3e-3"]
    assert [row[0] for row in rows] == ["lora.r=2", "lora.r=8", "lora.r=32"]


def test_no_mean_gains_by_a_run_that_failed(scratch: Path) -> None:
    """Of r=8 the hard model is missing; alone with the easy one it would look the best by far."""
    shares = {
        f"lora.r={r} lora={lora} model={model}": 0.95 if model == "easy" else 0.55
        for r in (2, 8)
        for lora in ("lora", "dora")
        for model in ("easy", "hard")
    }
    del shares["lora.r=8 lora=dora model=hard"]
    html = page_of(scratch, shares)
    by_rank_and_variant = heat_maps(html)[0]
    assert all(float(cell) > 0.9 for row in by_rank_and_variant[1:] for cell in row[1:])
    assert "Means of what every cell has: model=easy." in html


def test_a_key_that_is_the_same_on_a_board_is_no_axis(scratch: Path) -> None:
    jobs = []
    for number, (task, metric, r) in enumerate((t, m, r) for t, m in (("a", "accuracy"), ("b", "f1")) for r in (2, 4)):
        path = make_run(scratch / str(number), right=0.8, seed=number, metric=metric)
        jobs.append(SweepJob(number, (f"task={task}", f"lora.r={r}"), path))
    found = boards(jobs)
    assert len(found) == 2
    assert heat_maps(sweep_page(scratch, jobs, found)) == []


def test_a_search_has_parallel_coordinates_and_short_numbers(scratch: Path) -> None:
    shares = {f"train.lr=0.00{n}2345678901234 lora.alpha={7 * n}": 0.5 + n / 20 for n in range(1, 8)}
    html = page_of(scratch, shares)
    assert heat_maps(html) == []
    assert "validation/accuracy by train.lr, lora.alpha" in html
    assert len(re.findall("color-mix.*?</polyline>", html)) == 7
    assert "12345678" not in html
    assert "train.lr=0.007235" in html


def test_below_the_table_stands_what_its_columns_are(scratch: Path) -> None:
    shares = {"lora.r=2": 0.7, "lora.r=4": 0.8}
    text = parsed(page_of(scratch / "a", shares)).text
    assert "McNemar: exact test, of the first seed that both have, on rows that only one gets right." in text
    assert (
        "only one gets right; it tests accuracy, not matthews."
        in parsed(page_of(scratch / "b", shares, metric="matthews")).text
    )


def test_every_run_is_listed_with_its_seed_value_and_folder(scratch: Path) -> None:
    html = page_of(scratch, {"lora.r=2 seed=0": 0.7, "lora.r=4 seed=1": 0.8})
    assert "<summary>2 runs</summary>" in html
    assert all(str(scratch / name) in html for name in "01")
