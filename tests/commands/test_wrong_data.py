"""What is wrong with people's data, and the one line they get for it. `row` is the row of the fault table."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from conftest import check_refusal

WORDS = ("train", "model=tiny-bert", "task=text_classification", "task.data.train=a/train", "train.max_steps=1")
GOOD = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(8)]


def as_csv(rows: list[dict[str, object]]) -> bytes:
    return "\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]).encode()


def as_json(*changes: dict[str, object]) -> bytes:
    """Eight good rows of JSON lines, of which the last ones are replaced."""
    rows = [*GOOD[: len(GOOD) - len(changes)], *changes]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


DEEP = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b', "label": "a"}\n'
CASES = [
    # row, what it is, the file's extension, its content, what the line says
    (12, "no-text-column", ".csv", as_csv([{"txt": "a", "label": n % 2} for n in range(8)]), ["'text'", "txt, label"]),
    (12, "no-label-column", ".csv", as_csv([{"text": "a", "lable": n} for n in range(8)]), ["Did you mean 'lable'?"]),
    (
        12,
        "text-missing-in-one-row",
        ".jsonl",
        as_json({"tex": "x", "label": "a"}, *GOOD[:4]),
        [":4", "tex, label"],
    ),
    (12, "label-missing-in-one-row", ".jsonl", as_json({"text": "x"}), [":8", "'label'"]),
    (12, "a-short-row", ".csv", as_csv(GOOD) + b"\nonly", [":10", "the header has 2"]),
    (12, "a-column-twice", ".csv", b"text,text\na,b\n", [":1", "twice in the header"]),
    (13, "empty", ".csv", b"", ["empty: no rows"]),
    (13, "only-newlines", ".csv", b"\n\n\n", ["empty: no rows"]),
    (13, "only-a-header", ".csv", b"text,label\n", ["empty: no rows"]),
    (13, "empty-json-lines", ".jsonl", b"\n\n", ["empty: no rows"]),
    (14, "text-null", ".jsonl", as_json({"text": None, "label": "a"}), [":8", "holds null, not text"]),
    (14, "text-number", ".jsonl", as_json({"text": 3, "label": "a"}), [":8", "holds int, not text"]),
    (14, "text-list", ".jsonl", as_json({"text": ["x"], "label": "a"}), [":8", "holds list, not text"]),
    (16, "label-null", ".jsonl", as_json({"text": "x", "label": None}), [":8", "is null"]),
    (16, "label-empty", ".csv", as_csv(GOOD) + b"\nx,\n", [":10", "is empty"]),
    (16, "label-nan", ".jsonl", as_json({"text": "x", "label": float("nan")}), [":8", "is NaN"]),
    (16, "label-mixed", ".jsonl", as_json({"text": "x", "label": 3}), [":8", "a whole number", "is text"]),
    (16, "label-list", ".jsonl", as_json({"text": "x", "label": ["a"]}), [":8", "a list"]),
    (
        16,
        "fractions",
        ".csv",
        as_csv([{"text": "a", "label": n / 4} for n in range(8)]),
        ["task.regression=true"],
    ),
    (19, "one-class", ".csv", as_csv([{"text": n, "label": "x"} for n in range(8)]), ["label 'x'", "two or more"]),
    (19, "too-few-rows", ".csv", as_csv(GOOD[:2]), ["occurs twice", "task.data.validation=FILE"]),
    (21, "not-utf-8", ".csv", as_csv(GOOD) + b"\ncaf\xe9,a\n", [":10", "byte 4", "0xe9", "UTF-8"]),
    (21, "utf-16", ".csv", as_csv(GOOD).decode().encode("utf-16"), [":1", "UTF-16"]),
    (21, "nul-byte", ".csv", as_csv(GOOD) + b"\na\0b,a\n", [":10", "byte 2", "NUL"]),
    (23, "json-cut-off", ".jsonl", as_json() + b'{"text":', [":9", "not JSON"]),
    (23, "json-list", ".jsonl", as_json() + b"[1, 2]\n", [":9", "a JSON list"]),
    (23, "json-deep", ".jsonl", DEEP, [":1", "nested too deeply"]),
    (23, "broken-quotes", ".csv", b'text,label\n"a" b,c\n', [":2", "broken row"]),
    (11, "unknown-kind", ".xlsx", b"PK", ["'.xlsx'", ".csv, .tsv, .jsonl, .parquet, .txt"]),
    (11, "json-array", ".json", b"[]", ["'.json'", ".jsonl"]),
    (11, "no-parquet", ".parquet", b"nothing", ["not a readable Parquet file"]),
]


def name(value: object) -> str:
    return f"row-{value}" if isinstance(value, int) else value if isinstance(value, str) else ""


@pytest.fixture
def data(tmp_path: Path):
    """Write the training file a/train<extension>; gives the words that train on it."""

    def write(extension: str, content: bytes) -> list[str]:
        file = tmp_path / "a" / f"train{extension}"
        file.parent.mkdir()
        file.write_bytes(content)
        return [word + extension if word.startswith("task.data.train=") else word for word in WORDS]

    return write


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is an error."""
    monkeypatch.setattr("lora_cli.ground.load_base", lambda *args, **kwargs: pytest.fail("loaded a model"))


@pytest.mark.parametrize(("row", "what", "extension", "content", "says"), CASES, ids=name)
def test_wrong_data_is_refused_in_one_line_before_a_model_is_loaded(
    row, what, extension, content, says, data, refused, no_model
) -> None:
    line = refused(*data(extension, content))
    assert f"a/train{extension}" in line
    assert all(text in line for text in says), line


@pytest.mark.parametrize(("row", "what", "extension", "content", "says"), CASES[2::7], ids=name)
def test_a_process_of_its_own_says_the_same(row, what, extension, content, says, data, forked, tmp_path) -> None:
    answer = forked(*data(extension, content), cwd=tmp_path)
    assert answer.returncode == 2
    check_refusal(answer.stdout, answer.stderr, tmp_path)
    assert all(text in answer.stderr for text in says)


@pytest.mark.parametrize(
    ("row", "words", "says"),
    [
        (11, ["task.data.train=gone.csv"], "gone.csv: no such file"),
        (11, ["task.data.train=~/gone-from-home.csv"], "gone-from-home.csv: no such file"),
        (11, ["task.data.train=my data, v=2 (new).csv"], "my data, v=2 (new).csv: no such file"),
        (11, ["task.data.train=folder.csv"], "a folder, not a file"),
        (11, ["task.data.train=pipe.csv"], "a pipe or a device"),
        (11, ["task.data.train=good.csv", "task.data.validation=gone.csv"], "gone.csv: no such file"),
        (11, ["task.data.train=good.csv", "task.split=test"], "task.data.test=FILE is missing"),
        (11, ["task.data.train=good.csv", "task.split=dev"], "no split 'dev'"),
        (11, [], "task.data.train=FILE"),
        (11, ["task.data.validation=good.csv"], "task.data.train=FILE is missing"),
        (12, ["task.data.train=good.csv", "task.label=lable"], "Did you mean 'label'?"),
        (12, ["task.data.train=good.csv", "task.text=[text,txet]"], "Did you mean 'text'?"),
        (17, ["task.data.train=good.csv", "task.data.validation=new.csv"], "new.csv:3: no label 'c'. There are: a, b"),
        (17, ["task.data.train=good.csv", "task.labels=[a,c]"], "no label 'b'. There are: a, c"),
        (17, ["task.data.train=good.csv", "task.labels=[x,y]"], "no label 'a'. There are: x, y"),
        (18, ["task.data.train=good.csv", "task.regression=true", "task.metrics=[pearson]"], "'a' is not a number"),
        (27, ["task.data.hub=owner/gone"], "owner/gone (default) is not on this machine"),
        (27, ["task=sst2"], "nyu-mll/glue (sst2) is not on this machine"),
        (8, ["task.data.hub=../../etc"], "neither a folder that exists nor a hub id"),
        (8, ["task.data.embedded=../../etc"], "no such data set in this package"),
    ],
    ids=name,
)
def test_data_that_is_not_there_is_refused(row, words, says, scratch, refused, no_model, monkeypatch) -> None:
    monkeypatch.delenv("LORA_HUB_ROOT", raising=False)
    Path("good.csv").write_bytes(as_csv(GOOD))
    Path("new.csv").write_text("text,label\nx,a\ny,c\n")
    Path("folder.csv").mkdir()
    os.mkfifo("pipe.csv")
    assert says in refused("train", "model=tiny-bert", "task=text_classification", *words)


def train(call, *words: str, lr: str = "1e-3"):
    extra = ["train.max_steps=2", "train.batch_size=4", "device.threads=1", f"train.lr={lr}"]
    return call("train", "model=tiny-bert", "task=text_classification", *extra, *words)


def adapter() -> bytes:
    return Path("runs/latest/adapter/adapter_model.safetensors").read_bytes()


def test_a_byte_order_mark_and_crlf_change_nothing(scratch, call) -> None:
    Path("a.csv").write_bytes(as_csv(GOOD))
    Path("b.csv").write_bytes(b"\xef\xbb\xbf" + as_csv(GOOD).replace(b"\n", b"\r\n"))
    adapters = []
    for file in ("a.csv", "b.csv"):
        answer = train(call, f"task.data.train={file}")
        assert answer.code == 0, f"row 22: {answer.err}"
        adapters.append(adapter())
    assert adapters[0] == adapters[1]


def test_odd_texts_are_trained_on_and_counted(scratch, call) -> None:
    odd = ["", " ", "\ud800", "\x1b[31m", "\u202e", "x" * 10_000_000, "[/]", "<s> [SEP]"]
    rows = [{"text": text, "label": "ab"[n % 2]} for n, text in enumerate(odd * 2)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = train(call, "task.data.train=a.jsonl")
    assert answer.code == 0, f"rows 15, 20, 25, 33: {answer.err}"
    assert "with an empty text" in answer.err
    assert "cut at 128" in answer.err
    assert "\x1b" not in answer.err
    facts = json.loads(Path("runs/latest/run.json").read_text())
    assert all(value is None or value == value for value in facts["metrics"]["validation"].values())


def test_repeated_and_shared_rows_are_warned_about_with_their_number(scratch, call) -> None:
    Path("a.csv").write_bytes(as_csv([*GOOD, *GOOD[:3]]))
    Path("v.csv").write_bytes(as_csv(GOOD[:2]))
    answer = train(call, "task.data.train=a.csv", "task.data.validation=v.csv")
    assert answer.code == 0, "row 24"
    assert "3 of 11 train rows stand there more than once" in answer.err
    assert "2 of 2 validation rows stand in train as well" in answer.err


def test_a_split_of_one_class_is_scored_and_what_is_undefined_is_said(scratch, call) -> None:
    Path("a.csv").write_bytes(as_csv(GOOD))
    Path("v.csv").write_text("text,label\nx,a\ny,a\n")
    answer = train(call, "task.data.train=a.csv", "task.data.validation=v.csv", "task.metrics=[matthews,accuracy]")
    assert answer.code == 0, f"row 19: {answer.err}"
    assert "matthews is undefined: all rows have the same label" in answer.err
    assert json.loads(Path("runs/latest/run.json").read_text())["metrics"]["validation"]["matthews"] is None


def test_numbers_as_text_and_as_numbers_are_the_same_labels(scratch, call) -> None:
    rows = [{"text": f"t {n}", "label": n % 2} for n in range(8)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("a.csv").write_bytes(as_csv(rows))
    adapters = []
    for file in ("a.jsonl", "a.csv"):
        answer = train(call, f"task.data.train={file}")
        assert answer.code == 0, f"row 18: {answer.err}"
        adapters.append(adapter())
    assert adapters[0] == adapters[1]


def test_a_training_that_diverges_stops_with_exit_code_1_and_saves_nothing(scratch, call) -> None:
    Path("a.csv").write_bytes(as_csv(GOOD))
    answer = train(call, "task.data.train=a.csv", "train.max_steps=30", "train.max_grad_norm=null", lr="1e38")
    assert answer.code == 1, f"row 49: {answer.err}"
    assert "learning rate" in answer.err.splitlines()[-1]
    assert "Traceback" not in answer.err
    (run,) = (path.parent for path in Path("runs").glob("*/run.json"))
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert not (run / "adapter").exists()
