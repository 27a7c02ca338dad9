"""From the jobs of a sweep to configurations in their order, and to words that the tests allow."""

from __future__ import annotations

import csv
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from lora_cli.config import to_plain
from lora_cli.runs.directory import RunDirectory, write_json
from lora_cli.runs.leaderboard import boards, write_leaderboard
from lora_cli.runs.sweep import SweepJob, read_jobs, record
from lora_cli.spec import ClassificationSpec, TrainRun

LABELS = ["no", "yes"]
ROWS = 400


def make_run(
    folder: Path, *, right: float, seed: int = 0, parameters: int = 100, train_s: float = 1.0, metric: str = "accuracy"
) -> str:
    """A finished run's folder, of which a share of `right` of the rows is found."""
    references = np.random.default_rng(7).integers(2, size=ROWS)
    hit = np.random.default_rng(seed + 1).random(ROWS) < right
    predictions = np.where(hit, references, 1 - references)
    config = to_plain(TrainRun(task=ClassificationSpec(name="films", metrics=[metric]), seed=seed))
    run = RunDirectory.create(config, directory=folder, overrides=[])
    run.write_predictions(
        "validation",
        ({"label": LABELS[y], "prediction": LABELS[p]} for y, p in zip(references, predictions, strict=True)),
    )
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").write_bytes(b"x" * parameters)
    run.finish(
        labels=LABELS,
        data={"validation": {"rows": ROWS, "fingerprint": "f"}},
        parameters={"trainable": parameters, "total": 1000},
        metrics={"validation": {metric: float(hit.mean())}},
        cost={"train_s": train_s, "rows_per_s": 10.0, "peak_memory_mib": 300.0},
    )
    return str(folder)


def sweep(folder: Path, **shares: float) -> list[SweepJob]:
    """Jobs of rank r, three seeds each: r2=0.7."""
    jobs = []
    for name, right in shares.items():
        for seed in (1, 2, 3):
            path = make_run(folder / f"{name}-{seed}", right=right, seed=100 * int(name[1:]) + seed)
            overrides = ("task=films", f"lora.r={name[1:]}", f"seed={seed}")
            jobs.append(SweepJob(len(jobs), overrides, path))
    return jobs


def test_configurations_are_ranked_by_their_mean_over_seeds(scratch: Path) -> None:
    (board,) = boards(sweep(scratch, r2=0.6, r4=0.9, r8=0.75))
    assert (board.task, board.metric, board.split) == ("films", "accuracy", "validation")
    assert [row.title for row in board.rows] == ["lora.r=4", "lora.r=8", "lora.r=2"]
    best = board.rows[0]
    assert len(best.values) == 3
    assert best.mean == pytest.approx(np.mean(best.values))
    low, high = best.interval
    assert low < best.mean < high
    assert best.p is None
    assert all(row.p < 0.01 and row.p_mcnemar < 0.01 for row in board.rows[1:])


def test_words_say_no_more_than_was_shown(scratch: Path) -> None:
    small = make_run(scratch / "small", right=0.7, seed=1, parameters=100)
    large = make_run(scratch / "large", right=0.72, seed=2, parameters=400)
    poor = make_run(scratch / "poor", right=0.5, seed=3, parameters=200)
    found = [("lora.r=2", small), ("lora.r=8", large), ("lora.r=4", poor)]
    (board,) = boards([SweepJob(n, (word,), path) for n, (word, path) in enumerate(found)])
    best, second, last = board.rows
    smaller, worse = board.sentences
    assert worse == f"{last.title} is worse than {best.title} (p < 0.001)"
    assert smaller.startswith(f"{second.title} is not significantly worse than {best.title} (p = ")
    assert ("4× smaller" in smaller) == (second.title == "lora.r=2")


def test_the_front_has_no_one_that_another_beats_in_everything(scratch: Path) -> None:
    made = {
        "best": make_run(scratch / "best", right=0.9, parameters=400, train_s=40.0),
        "small": make_run(scratch / "small", right=0.8, parameters=100, train_s=20.0),
        "beaten": make_run(scratch / "beaten", right=0.7, parameters=200, train_s=30.0),
        "fast": make_run(scratch / "fast", right=0.6, parameters=200, train_s=10.0),
    }
    (board,) = boards([SweepJob(n, (f"lora={name}",), path) for n, (name, path) in enumerate(made.items())])
    assert {row.title.partition("=")[2] for row in board.rows if row.on_front} == {"best", "small", "fast"}


@pytest.mark.parametrize(("quick", "slow"), [(0.2, 0.9), (100.0, 109.0)])
def test_no_larger_and_worse_one_is_on_the_front_because_it_was_a_little_faster(
    quick: float, slow: float, scratch: Path
) -> None:
    good = make_run(scratch / "good", right=0.9, parameters=100, train_s=slow)
    worse = make_run(scratch / "worse", right=0.8, parameters=200, train_s=quick)
    (board,) = boards([SweepJob(0, ("lora.r=2",), good), SweepJob(1, ("lora.r=4",), worse)])
    assert [row.on_front for row in board.rows] == [True, False]


def test_times_that_the_seeds_spread_by_are_equal(scratch: Path) -> None:
    jobs = []
    for name, right, times in (("2", 0.9, (50.0, 80.0)), ("4", 0.7, (50.0, 50.0))):
        for seed, train_s in enumerate(times):
            path = make_run(scratch / f"{name}-{seed}", right=right, seed=seed, train_s=train_s)
            jobs.append(SweepJob(len(jobs), (f"lora.r={name}", f"seed={seed}"), path))
    (board,) = boards(jobs)
    assert board.rows[0].times == (50.0, 80.0)
    assert [row.on_front for row in board.rows] == [True, False]


def test_the_same_predictions_are_called_that(scratch: Path) -> None:
    words = {"lora.r=8": 400, "lora.r=2": 100}
    paths = {word: make_run(scratch / word, right=0.7, seed=1, parameters=size) for word, size in words.items()}
    (board,) = boards([SweepJob(n, (word,), path) for n, (word, path) in enumerate(paths.items())])
    assert [row.same_answers for row in board.rows] == [False, True]
    assert board.sentences == ["lora.r=8 gives the same predictions as lora.r=2 on every row"]


def test_numbers_are_short_in_words_and_whole_in_files(scratch: Path) -> None:
    values = ("0.0012296071107", "0.0088880000001", "12345678")
    paths = [make_run(scratch / value, right=0.9 - 0.1 * n, seed=n) for n, value in enumerate(values)]
    (board,) = boards([SweepJob(n, (f"train.lr={values[n]}",), path) for n, path in enumerate(paths)])
    assert board.names == ["train.lr=0.00123", "train.lr=0.008888", "train.lr=12345678"]
    assert board.sentences[0].startswith("train.lr=0.008888 is worse than train.lr=0.00123 ")
    assert board.rows[0].title == "train.lr=0.0012296071107"


def test_numbers_that_four_digits_do_not_tell_apart_have_more(scratch: Path) -> None:
    paths = [make_run(scratch / str(n), right=0.9 - 0.1 * n, seed=n) for n in range(2)]
    (board,) = boards([SweepJob(n, (f"train.lr=0.00123451{n}",), path) for n, path in enumerate(paths)])
    assert board.names == ["train.lr=0.00123451", "train.lr=0.001234511"]


def test_the_same_configuration_twice_counts_once(scratch: Path) -> None:
    path = make_run(scratch / "a", right=0.8)
    other = make_run(scratch / "b", right=0.7, seed=5)
    words = [("lora.r=2", path), ("lora.r=2", path), ("lora.r=4", other)]
    (board,) = boards([SweepJob(n, (word,), run) for n, (word, run) in enumerate(words)])
    assert [len(row.values) for row in board.rows] == [1, 1]


def test_how_a_job_was_run_is_no_part_of_its_configuration(scratch: Path) -> None:
    paths = [make_run(scratch / str(n), right=0.8, seed=n) for n in range(2)]
    jobs = [SweepJob(0, ("lora.r=2", "tracker=tensorboard", "tracker.project=x"), paths[0])]
    jobs.append(SweepJob(1, ("lora.r=4", "sweep.redo=all"), paths[1]))
    (board,) = boards(jobs)
    assert {row.title for row in board.rows} == {"lora.r=2", "lora.r=4"}


def test_other_tasks_have_a_board_of_their_own(scratch: Path) -> None:
    jobs = [
        SweepJob(0, ("task=a",), make_run(scratch / "a", right=0.8)),
        SweepJob(1, ("task=b",), make_run(scratch / "b", right=0.8, metric="f1")),
    ]
    assert [board.metric for board in boards(jobs)] == ["accuracy", "f1"]


@pytest.mark.parametrize("damage", ["predictions/validation.jsonl", "run.json"])
def test_a_damaged_run_costs_nobody_else_anything(damage: str, scratch: Path) -> None:
    jobs = sweep(scratch, r2=0.7, r4=0.8)
    (Path(jobs[0].run) / damage).write_text('{"label": ')
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (board,) = boards(jobs, said.append)
    assert [damage in line for line in (*said, *(str(each.message) for each in caught))] == [True]
    rows = {row.title: row for row in board.rows}
    assert len(rows["lora.r=4"].values) == 3
    assert len(rows["lora.r=2"].values) == (3 if "predictions" in damage else 2)
    if "predictions" in damage:
        assert rows["lora.r=2"].p is None


def test_a_run_that_cannot_be_read_is_named(scratch: Path) -> None:
    jobs = sweep(scratch, r2=0.7)
    (Path(jobs[1].run) / "run.json").unlink()
    said: list[str] = []
    boards(jobs, said.append)
    (line,) = said
    assert line.startswith(f"job 1 is not on the leaderboard, its run {jobs[1].run} cannot be read: ")


@pytest.mark.parametrize("name", ["sweep", "runs/sweep"])
def test_a_sweep_that_was_moved_or_copied_has_its_own_runs(name: str, scratch: Path) -> None:
    folder, elsewhere = Path(name), Path("elsewhere")
    for job in sweep(folder, r2=0.7):
        record(folder.resolve(), job)
    assert [job.run for job in read_jobs(folder)] == [f"{name}/r2-{seed}" for seed in (1, 2, 3)]
    record(folder, SweepJob(3, ("lora.r=4",), make_run(Path("runs/other/0"), right=0.8), status="found"))
    shutil.copytree(folder, elsewhere / "sweep")
    for _ in range(2):
        (board,) = boards(read_jobs(elsewhere / "sweep"))
        assert [list(row.runs) for row in board.rows] == [
            ["runs/other/0"],
            [f"elsewhere/sweep/r2-{seed}" for seed in (1, 2, 3)],
        ]
        shutil.rmtree(folder, ignore_errors=True)


def test_failed_jobs_are_on_no_board(scratch: Path) -> None:
    jobs = [SweepJob(0, ("lora.r=0",), None, "lora.r=0: too small", "failed")]
    assert boards(jobs) == []


def test_files_hold_what_the_screen_shows(scratch: Path) -> None:
    found = boards(sweep(scratch, r2=0.6, r4=0.9))
    write_leaderboard(scratch, found)
    (table,) = json.loads((scratch / "leaderboard.json").read_text())["boards"]
    assert table["configurations"][0]["mean"] == found[0].rows[0].mean
    assert table["sentences"] == found[0].sentences
    with (scratch / "leaderboard.csv").open() as file:
        first, second = csv.DictReader(file)
    assert first["title"] == "lora.r=4"
    assert float(second["p"]) == found[0].rows[1].p
    assert second["runs"].split() == list(found[0].rows[1].runs)


def test_a_title_that_a_spreadsheet_would_run_is_defused(scratch: Path) -> None:
    jobs = [SweepJob(n, (f"={n}",), make_run(scratch / str(n), right=0.8, seed=n)) for n in range(2)]
    write_leaderboard(scratch, boards(jobs))
    cells = [row["title"] for row in csv.DictReader((scratch / "leaderboard.csv").read_text().splitlines())]
    assert all(cell.startswith("'=") for cell in cells)


def test_jobs_are_read_back_in_their_order_and_damaged_ones_are_none(scratch: Path) -> None:
    jobs = [SweepJob(number, ("lora.r=2",), "x", None, "running", 7) for number in (10, 9)]
    for job in jobs:
        record(scratch, job)
    write_json(scratch / "jobs" / "3.json", {"number": "three"})
    (scratch / "jobs" / "4.json").write_text("{")
    found = read_jobs(scratch)
    assert [(job.number, job.overrides, job.status) for job in found] == [
        (9, ("lora.r=2",), "running"),
        (10, ("lora.r=2",), "running"),
    ]
