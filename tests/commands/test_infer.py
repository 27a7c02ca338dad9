"""lora infer by the real command line: every way in and out, in the order of the input."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from commands.conftest import Finished, read_jsonl


@pytest.fixture
def here(finished: Finished, films: Path) -> Path:
    """The current directory, with a copy of the run in it."""
    shutil.copytree(finished.path, films / "copy")
    return films


@pytest.fixture
def texts() -> list[str]:
    return ["=1+1", "zzzz test", 'aa, "quoted" ünï', "mmmmmm " * 300, "", "aa"]


def test_infer_on_the_validation_file_gives_the_runs_accuracy(finished: Finished, lora) -> None:
    words = ["run=latest", "input=validation.csv", "output=out/answers.jsonl"]
    answer = lora("infer", *words, cwd=finished.home, env=finished.env)
    assert answer.returncode == 0, answer.stderr
    rows = read_jsonl(finished.home / "out" / "answers.jsonl")
    with (finished.home / "validation.csv").open() as file:
        labels = [row["verdict"] for row in csv.DictReader(file)]
    shutil.rmtree(finished.home / "out")
    right = sum(row["label"] == label for row, label in zip(rows, labels, strict=True))
    assert right / len(labels) == finished.facts()["metrics"]["validation"]["accuracy"]
    assert not Path(finished.env["DIALLED"]).exists()


def test_standard_input_is_answered_line_by_line(finished: Finished, lora) -> None:
    answer = lora("infer", "run=latest", "input=-", cwd=finished.home, stdin="zzzz\naa\n")
    assert answer.returncode == 0, answer.stderr
    assert [json.loads(line)["text"] for line in answer.stdout.splitlines()] == ["zzzz", "aa"]


def test_all_formats_give_the_same_answers_in_order(here, texts, call) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"id": number, "text": text} for number, text in enumerate(texts)]
    Path("in.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Path("in.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *([row["id"], row["text"]] for row in rows)])
    parquet.write_table(pyarrow.Table.from_pylist(rows), "in.parquet")
    answers = []
    for kind in ("txt", "jsonl", "csv", "parquet"):
        answer = call("infer", "run=copy", f"input=in.{kind}", f"output={kind}.jsonl", "batch_size=2")
        assert answer.code == 0, answer.err
        answers.append(read_jsonl(Path(f"{kind}.jsonl")))
    assert [row["text"] for row in answers[0]] == texts
    assert all(found == answers[0] for found in answers)
    assert all(abs(sum(row["probabilities"].values()) - 1) < 1e-5 for row in answers[0])

    for kind in ("csv", "parquet"):
        assert call("infer", "run=copy", "input=in.txt", f"output=out.{kind}", "batch_size=2").code == 0
    with Path("out.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert table[0]["text"] == "'=1+1", "no spreadsheet may run it"
    assert [row["label"] for row in table] == [row["label"] for row in answers[0]]
    columns = parquet.read_table("out.parquet").to_pydict()
    assert columns["text"] == texts
    assert columns["p(good)"] == [row["probabilities"]["good"] for row in answers[0]]


@pytest.mark.parametrize("text", ["???", "${x}", "a=b,c", "null", "'", "[1, 2", "-", "x" * 3000, "ünï\x1b[31m"])
def test_a_text_is_taken_as_it_stands(text, here, call) -> None:
    answer = call("infer", "run=copy", f"text={text}")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["text"] == text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run=copy"], 'give one of text="..." and input=FILE'),
        (["run=copy", "text=a", "input=train.csv"], "give one of"),
        (["run=copy", "text=a", "text_pair=b"], "this task reads text"),
        (["run=copy", "text_pair=b"], "give one of"),
        (["run=copy", "input=nope.csv"], "nope.csv: no such file"),
        (["run=copy", "input=train.csv", "output=a.xlsx"], ".jsonl, .csv, .parquet"),
        (["run=copy", "input=other.csv"], "no column (task.text) 'text'"),
        (["run=copy", "imput=train.csv"], "Did you mean input?"),
        (["text=hi"], "run=FOLDER, or run=latest"),
        (["hello"], "overrides look like key=value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_infer_is_refused(words, says, here, refused) -> None:
    Path("other.csv").write_text("txt\na\n")
    assert says in refused("infer", *words)


def test_an_error_in_a_late_row_leaves_no_output(here, call) -> None:
    Path("in.jsonl").write_text('{"text": "a"}\n' * 5 + '{"text": null}\n')
    answer = call("infer", "run=copy", "input=in.jsonl", "output=out.jsonl")
    assert answer.code == 2
    assert "in.jsonl:6" in answer.err
    assert not Path("out.jsonl").exists()
