"""lora infer by the real command line: every way in and out, in the order of the input."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from commands.conftest import Finished, read_jsonl, write_csv
from conftest import Completed
from lora_cli.terminal import plain


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


def test_standard_input_is_answered_line_by_line(finished: Finished, forked) -> None:
    answer = forked("infer", "run=latest", "input=-", cwd=finished.home, stdin="zzzz\naa\n")
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
        (["run=copy"], 'give one of text="...", prompt="..." and input=FILE'),
        (["run=copy", "prompt=a"], "text_classification writes no text; give it as text="),
        (["run=copy", "prompt=a", "output=b.csv"], "its answer goes to the terminal; give text= with output="),
        (["run=copy", "prompt=a", "text=b"], "give one of"),
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


SHORT = ("task.decode.max_new_tokens=12", "task.decode.num_beams=1", "device.threads=1")
DRAWN = ("task.decode.sample=true", "task.decode.temperature=4.0")
PUBS = [
    {"id": number, "meaning_representation": f"name[{name}], eatType[pub]", "human_reference": f"{name} is a pub."}
    for number, name in enumerate(("Blue Spice", "The Mill", "Wildwood", "The Mill") * 4)
]


@pytest.fixture(scope="module")
def pubs(tmp_path_factory: pytest.TempPathFactory, forked: Callable[..., Completed]) -> Finished:
    """A run on structured data, with columns named as in E2E, which writes bytes without sense."""
    home = tmp_path_factory.mktemp("pubs")
    write_csv(home / "pubs.csv", PUBS)
    words = ["task=e2e", "model=tiny-gpt2", "task.data.train=pubs.csv", "train.max_steps=2", "device.threads=1"]
    process = forked("train", *words, *SHORT[:2], "task.metrics=[perplexity]", cwd=home)
    assert process.returncode == 0, process.stderr
    return Finished(home, (home / "runs" / "latest").resolve(), process, {})


@pytest.fixture
def answers(call, pubs: Finished) -> Callable[..., list[dict[str, str]]]:
    """The JSON lines that `lora infer` prints."""

    def run(*words: str) -> list[dict[str, str]]:
        answer = call("infer", f"run={pubs.path}", *SHORT, *words)
        assert (answer.code, answer.err) == (0, "")
        return [json.loads(line) for line in answer.out.splitlines()]

    return run


def test_an_answer_to_a_prompt_is_plain_text(pubs: Finished, forked, answers) -> None:
    prompt = PUBS[0]["meaning_representation"]
    streamed = forked("infer", "run=latest", f"prompt={prompt}", *SHORT, *DRAWN, cwd=pubs.home)
    assert (streamed.returncode, streamed.stderr) == (0, "")
    (answer,) = answers(f"text={prompt}", *DRAWN)
    assert answer["meaning_representation"] == prompt
    assert streamed.stdout == plain(answer["prediction"]) + "\n" != "\n"


def test_structured_data_is_read_from_every_kind_of_file_in_order(answers, call, pubs: Finished) -> None:
    import pyarrow
    from pyarrow import parquet

    write_csv(Path("in.csv"), PUBS)
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PUBS))
    parquet.write_table(pyarrow.Table.from_pylist(PUBS), "in.parquet")
    rows = answers("input=in.csv", "batch_size=3")
    assert [list(row) for row in rows] == [["meaning_representation", "prediction"]] * len(PUBS)
    assert [row["meaning_representation"] for row in rows] == [row["meaning_representation"] for row in PUBS]
    assert rows == answers("input=in.jsonl", "batch_size=3") == answers("input=in.parquet", "batch_size=5")

    words = [f"run={pubs.path}", *SHORT, "input=in.csv", "batch_size=3"]
    for kind in ("jsonl", "csv", "parquet"):
        assert call("infer", *words, f"output=out.{kind}").code == 0
    assert read_jsonl(Path("out.jsonl")) == parquet.read_table("out.parquet").to_pylist() == rows
    with Path("out.csv").open(encoding="utf-8", newline="") as file:
        assert [row["meaning_representation"] for row in csv.DictReader(file)] == [
            row["meaning_representation"] for row in PUBS
        ]


def test_drawn_answers_depend_on_the_seed_not_on_how_fast_lines_come_in(answers, monkeypatch) -> None:
    lines = [str(row["meaning_representation"]) for row in PUBS[:4]]
    slow, fast, other = (
        answers("input=-", *DRAWN, seed) for seed in with_stdin(monkeypatch, lines, ("seed=3", "seed=3", "seed=4"))
    )
    assert slow == fast != other
    assert slow[1]["prediction"] != slow[3]["prediction"], "the same prompt, drawn twice"


def with_stdin(monkeypatch: pytest.MonkeyPatch, lines: Sequence[str], seeds: Sequence[str]):
    """Each of `seeds`, with `lines` on standard input anew."""
    import io
    import sys

    for seed in seeds:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
        yield seed


def test_a_line_of_text_is_a_conversation_and_a_file_may_hold_whole_ones(talking: Finished, call) -> None:
    asked = [{"role": "user", "content": "hi \ud83d"}]
    Path("in.jsonl").write_text(json.dumps({"messages": asked}) + "\n")
    Path("in.txt").write_text("hi\n")
    words = [f"run={talking.path}", "task.decode.max_new_tokens=4"]
    assert json.loads(call("infer", *words, "input=in.txt").out)["messages"] == [{"role": "user", "content": "hi"}]
    assert call("infer", *words, "input=in.jsonl", "output=out.csv").code == 0
    with Path("out.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert json.loads(row["messages"]) == asked


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["prompt=nonsense"], "prompt: meaning_representation: not a list of attribute[value]"),
        (["text=name[a]", "text_pair=b"], "e2e reads one text"),
        (["input=in.csv"], "no column (task.format=e2e) 'meaning_representation'"),
        (["prompt=name[a]", "task.decode.beams=2"], "Did you mean task.decode.num_beams?"),
        (["prompt=name[a]", "task.decode.max_new_tokens=999"], "positions"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_prompt_that_cannot_be_answered_is_refused(words, says, pubs: Finished, scratch: Path, call) -> None:
    Path("in.csv").write_text("mr\nname[a]\n")
    answer = call("infer", f"run={pubs.path}", *words)
    assert answer.code == 2, answer
    assert answer.out.strip() == ""
    assert says in answer.err
    assert len(answer.err.splitlines()) == 1
