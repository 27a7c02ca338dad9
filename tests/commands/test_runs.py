"""lora runs, lora diff and lora report on runs that are finished, interrupted, damaged and somebody else's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from commands.conftest import FILMS, TINY, Finished, read_jsonl, write_films
from conftest import Completed
from test_page import parsed

SHORT = ("train", *TINY, *FILMS, "train.max_steps=12", "train.eval_every=4", "train.log_every=4")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, forked) -> Path:
    """Three runs of two methods, one of them in a sweep that has a failed job beside it."""
    home = tmp_path_factory.mktemp("runs")
    write_films(home)
    for words, code in ((["lora=dora", "hydra.run.dir=runs/dora"], 0), (["-m", "lora.r=2,4,0"], 1)):
        done: Completed = forked(*SHORT, *words, cwd=home)
        assert done.returncode == code, done.stderr
    return home


@pytest.fixture
def here(home: Path, call, monkeypatch) -> Path:
    monkeypatch.chdir(home)
    return home


def listed(answer) -> list[dict[str, object]]:
    assert answer.code == 0, answer.err
    return [json.loads(line) for line in answer.out.splitlines()]


def test_all_runs_are_listed_those_of_sweeps_too(here, call) -> None:
    found = listed(call("runs", "--json"))
    assert {run["method"] for run in found} == {"lora r=2", "lora r=4", "dora r=8"}
    assert all(run["status"] == "finished" and run["task"] == "text_classification" for run in found)
    facts = json.loads(Path("runs/dora/run.json").read_text())
    (dora,) = (run for run in found if run["path"] == "runs/dora")
    assert dora["value"] == facts["metrics"]["validation"]["accuracy"]
    assert dora["parameters"] == facts["parameters"]["trainable"]
    table = call("runs").out
    assert "dora r=8" in table
    assert "validation" not in table


def test_runs_are_chosen_and_sorted(here, call) -> None:
    by_size = [run["parameters"] for run in listed(call("runs", "json=true", "sort=parameters"))]
    assert by_size == sorted(by_size)
    best = [run["value"] for run in listed(call("runs", "json=true", "sort=metric"))]
    assert best == sorted(best, reverse=True)
    assert len(listed(call("runs", "json=true", "where.name=_sweep_"))) == 2
    assert listed(call("runs", "json=true", "where.task=sst2")) == []
    limited = call("runs", "limit=1")
    assert "1 of 3 runs; limit=0 shows all" in limited.out


def test_runs_of_one_task_and_model_tell_what_sets_them_apart(here, call, tmp_path, monkeypatch) -> None:
    for name in ("2026-11-29_films_tiny-bert_r8_1a2b3c4d", "2026-11-29_films_tiny-bert_r8_5e6f7a8b"):
        shutil.copytree(here / "runs" / "dora", tmp_path / "runs" / name)
    file = tmp_path / "runs" / name / "config.yaml"
    file.write_text(file.read_text().replace("\nseed: 0", "\nseed: 7"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    rows = [line.split()[:4] for line in call("runs", "where.name=films").out.splitlines()[2:]]
    assert sorted(rows) == [
        ["2026-11-29_films_tiny-bert_r8_1a2b3c4d", "dora", "r=8", "seed=0"],
        ["2026-11-29_films_tiny-bert_r8_5e6f7a8b", "dora", "r=8", "seed=7"],
    ]


def test_a_damaged_run_is_listed_as_that(here, call, tmp_path, monkeypatch) -> None:
    shutil.copytree(here / "runs" / "dora", tmp_path / "runs" / "cut")
    (tmp_path / "runs" / "cut" / "run.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    (run,) = listed(call("runs", "--json"))
    assert (run["path"], run["status"]) == ("runs/cut", "damaged")
    assert "damaged" in call("runs").out


def test_without_runs_it_says_what_makes_one(scratch: Path, call) -> None:
    answer = call("runs")
    assert answer.code == 0
    assert "there are no runs under runs/ yet; lora train makes one" in answer.err


def test_two_runs_are_put_side_by_side(here, call) -> None:
    (sweep,) = Path("runs").glob("*_sweep_*")
    answer = call("diff", f"run={sweep}/0", f"other={sweep}/1")
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    changed = [line.split() for line in lines[2 : lines.index("", 2)]]
    assert changed == [["lora.r", "2", "4"]]
    assert "data       the same rows" in lines
    assert "training   parts at step 4: " in answer.out
    assert "versions   equal, and the device too" in lines
    rows = [read_jsonl(sweep / n / "predictions/validation.jsonl") for n in "01"]
    flips = [(a, b) for a, b in zip(*rows, strict=True) if a["prediction"] != b["prediction"]]
    assert f"validation: {len(flips)} of 30 predictions differ" in answer.out
    only = sum(a["prediction"] == a["label"] for a, _ in flips)
    assert f"{only} right only in the first" in answer.out


def test_a_run_beside_itself_is_equal(here, call) -> None:
    answer = call("diff", "run=runs/dora", "other=dora")
    assert answer.code == 0, answer.err
    assert "training   equal to the last bit at every step" in answer.out
    assert "validation: 0 of 30 predictions differ" in answer.out


@pytest.mark.parametrize(
    ("what", "told"),
    [("run=runs/dora", "validation/accuracy"), ("sweep=latest", "against parameters that train, by rank")],
)
def test_a_terminal_without_a_browser_gets_a_sketch(what: str, told: str, here, call, monkeypatch) -> None:
    assert told not in call("report", what, "output=sketched.html").err
    monkeypatch.setenv("FORCE_COLOR", "1")
    answer = call("report", what, "output=sketched.html")
    assert told in answer.err
    assert "└" in answer.err
    assert "└" not in answer.out


def test_a_report_of_a_run_has_its_figures_and_how_to_get_them_again(here, call) -> None:
    assert call("report", "run=runs/dora", "output=dora.html").out == "dora.html\n"
    found = parsed(Path("dora.html").read_text())
    facts = json.loads(Path("runs/dora/run.json").read_text())
    assert f"{facts['metrics']['validation']['accuracy']:.4f}"[:6] in found.text
    assert "(after 4 of 12 steps)" in found.text
    for line in ("lora=dora", "lora eval run=runs/dora task.split=validation", "lora rerun run=runs/dora"):
        assert line in found.text
    assert facts["base"]["fingerprint"] in found.text
    assert found.text.count("label \\ prediction") == 1
    assert len([tag for tag, _ in found.tags if tag == "polyline"]) >= 2, "losses and the metric"


def test_no_page_is_made_of_a_sweep_whose_runs_are_gone(here, call, tmp_path) -> None:
    (sweep,) = Path("runs").glob("*_sweep_*")
    shutil.copytree(sweep / "jobs", tmp_path / "moved" / "jobs")
    answer = call("report", f"sweep={tmp_path}/moved")
    assert answer.code == 2
    assert "job 0 is not on the leaderboard, its run" in answer.err
    assert answer.err.splitlines()[-1].endswith("no finished run of the sweep can be read; there is nothing to report")
    assert not (tmp_path / "moved" / "report.html").exists()


def test_a_sweep_writes_its_report_and_it_can_be_made_again(here, call) -> None:
    (sweep,) = Path("runs").glob("*_sweep_*")
    first = (sweep / "report.html").read_text()
    answer = call("report", "sweep=latest")
    assert answer.out == f"{sweep}/report.html\n"
    assert (sweep / "report.html").read_text() == first
    found = parsed(first)
    assert "2 of 3 jobs finished" in found.text
    assert "lora.r=0: a whole number from 1" in found.text
    assert "lora train" in found.text
    assert [tag for tag, _ in found.tags].count("circle") == 4, "two configurations against size and time"


def test_a_sweep_in_the_place_of_a_run_is_told(here, call) -> None:
    (sweep,) = Path("runs").glob("*_sweep_*")
    answer = call("report", f"run={sweep}")
    assert answer.code == 2
    assert f"its runs are {sweep}/0 and so on, and lora report takes sweep={sweep}" in answer.err


def test_what_a_run_says_of_itself_stays_text(here, call, tmp_path, monkeypatch) -> None:
    run = shutil.copytree(here / "runs" / "dora", tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    nasty = "<script>alert(1)</script>"
    facts["versions"] = {nasty: nasty}
    facts["labels"] = [nasty, *facts["labels"][1:]]
    (run / "run.json").write_text(json.dumps(facts))
    rows = read_jsonl(run / "predictions/validation.jsonl")
    (run / "predictions/validation.jsonl").write_text(
        "".join(json.dumps({**row, "label": nasty, "prediction": nasty + "2"}) + "\n" for row in rows)
    )
    monkeypatch.chdir(tmp_path)
    assert call("report", "run=run").code == 0
    found = parsed((run / "report.html").read_text())
    assert "script" not in {tag for tag, _ in found.tags}
    assert nasty in found.text


@pytest.fixture
def damaged(here: Path, tmp_path: Path, monkeypatch):
    """A copy of a run beside the run, with a file of it that holds no text any more."""

    def damage(file: str) -> None:
        for name in ("whole", "cut"):
            shutil.copytree(here / "runs" / "dora", tmp_path / "runs" / name)
        (tmp_path / "runs" / "cut" / file).write_bytes(b"\xff")
        monkeypatch.chdir(tmp_path)

    return damage


@pytest.mark.parametrize("file", ["metrics.jsonl", "predictions/validation.jsonl"])
def test_a_page_without_what_is_damaged_says_so(file: str, damaged, call) -> None:
    damaged(file)
    answer = call("report", "run=runs/cut")
    assert answer.code == 0
    (line,) = answer.err.splitlines()
    assert f"runs/cut/{file}: not readable" in line
    assert line.endswith("the page is without it")


def test_damaged_predictions_leave_the_rest_of_a_comparison(damaged, call) -> None:
    damaged("predictions/validation.jsonl")
    answer = call("diff", "run=runs/cut", "other=runs/whole")
    assert answer.code == 0
    assert "training   equal to the last bit at every step" in answer.out
    assert "runs/cut/predictions/validation.jsonl: not readable" in answer.err


def test_damaged_figures_are_told_before_anything_is_compared(damaged, call) -> None:
    damaged("metrics.jsonl")
    answer = call("diff", "run=runs/whole", "other=runs/cut")
    assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1)
    assert "runs/cut/metrics.jsonl: not readable" in answer.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["runs", "sort=size"], "sort=size: no such order"),
        (["runs", "where.status=done"], "where.status=done: no such status"),
        (["diff", "run=runs/dora"], "other: needs a value"),
        (["diff", "run=runs/dora", "other=nope"], "nope"),
        (["diff", "run=runs/dora", "other=runs/dora/adapter"], "an adapter without its run"),
        (["report"], "report: run: give run=FOLDER or sweep=FOLDER, one of them"),
        (["report", "run=a", "sweep=b"], "give run=FOLDER or sweep=FOLDER, one of them"),
        (["report", "sweep=nope"], "nope"),
        (["report", "sweep=runs/dora"], "sweep=runs/dora: a run, not a sweep: run=runs/dora"),
        (
            ["report", "run=runs/dora", "output=train.csv/page.html"],
            "train.csv/page.html: File exists; output=FILE",
        ),
        (["report", "run=runs/dora", "output=train.csv"], "output=train.csv: holds something else than a page"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_shown_is_refused_in_one_line(words, told, here, call) -> None:
    before = sorted(here.rglob("*"))
    answer = call(*words)
    assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1)
    assert told in answer.err
    assert sorted(here.rglob("*")) == before


def test_a_finished_run_of_another_folder_is_reported_beside_it(
    finished: Finished, call, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = call("report", f"run={finished.path}", "output=page.html")
    assert answer.code == 0, answer.err
    assert "test/accuracy" in parsed((tmp_path / "page.html").read_text()).text
