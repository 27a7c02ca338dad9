"""Files that people really have, and those nobody should have."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.errors import DataError
from lora_cli.tasks.files import read_records, read_stdin
from lora_cli.tasks.rows import Rows, overlap, read_file, repeats, stream, unknown

CELLS = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=12)


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def csv_file(tmp_path: Path) -> Path:
    return written(tmp_path / "a.csv", 'text,label\nfine,1\n"two\nlines, ""quoted""",0\n\nNone,NA\n')


def test_csv_keeps_quoted_newlines_and_has_no_magic_words(csv_file: Path) -> None:
    assert list(read_file(csv_file)) == [
        {"text": "fine", "label": "1"},
        {"text": 'two\nlines, "quoted"', "label": "0"},
        {"text": "None", "label": "NA"},
    ]


def test_a_row_knows_the_line_it_begins_on(csv_file: Path) -> None:
    rows = read_file(csv_file)
    assert [rows.where(i) for i in range(3)] == [f"{csv_file}:2", f"{csv_file}:3", f"{csv_file}:6"]


def test_byte_order_mark_and_crlf_change_nothing(csv_file: Path, tmp_path: Path) -> None:
    dos = written(tmp_path / "dos.csv", b"\xef\xbb\xbf" + csv_file.read_bytes().replace(b"\n", b"\r\n"))
    assert read_file(dos).fingerprint == read_file(csv_file).fingerprint


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6), st.sampled_from([",", "\t"]))
def test_what_the_csv_module_writes_is_read_back(tmp_path_factory, table, delimiter) -> None:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter, lineterminator="\n").writerows([("a", "b"), *table])
    folder = tmp_path_factory.mktemp("csv")
    path = written(folder / ("t.csv" if delimiter == "," else "t.tsv"), buffer.getvalue())
    assert [(row["a"], row["b"]) for row in read_file(path)] == table


@settings(max_examples=30, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=8) | st.integers() | st.none()), min_size=1))
def test_json_lines_are_read_back(tmp_path_factory, rows) -> None:
    content = "\n\n".join(json.dumps(row) for row in rows)
    assert list(read_file(written(tmp_path_factory.mktemp("json") / "t.jsonl", content))) == rows


def test_parquet_is_read_and_numbers_its_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, None]}), tmp_path / "t.parquet")
    rows = read_file(tmp_path / "t.parquet")
    assert list(rows) == [{"text": "a", "label": 0}, {"text": "b", "label": None}]
    assert rows.where(1) == f"{tmp_path}/t.parquet row 2"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.csv", b"", "empty"),
        ("t.csv", b"\n\n\r\n", "empty"),
        ("t.csv", b"text,label\n", "empty"),
        ("t.jsonl", b"\n \n", "empty"),
        ("t.txt", b"", "empty"),
        ("t.csv", b"a,b\n1\n", "t.csv:2: 1 cells, but the header has 2"),
        ("t.csv", b"a,b\n\"1\n2\",3\n1,2,3\n", "t.csv:4: 3 cells"),
        ("t.csv", b"a,a\n1,2\n", "'a' stands twice"),
        ("t.csv", b"a,\n1,2\n", "column 2 of the header has no name"),
        ("t.csv", b'a,b\n1,2\n"never closed,3\n4,5\n', "t.csv:3: broken row"),
        ("t.csv", b"a\nok\ncaf\xe9\n", "t.csv:3: byte 4 of the line (0xe9) is not UTF-8"),
        ("t.jsonl", '{"a": "é"}'.encode("latin-1"), "t.jsonl:1: byte 8"),
        ("t.csv", "a\nb\n".encode("utf-16"), "t.csv:1: byte 1: the file is UTF-16"),
        ("t.csv", "a\nb\n".encode("utf-16-le"), "t.csv:1: byte 2 of the line is NUL"),
        ("t.txt", b"x\n\xed\xa0\x80\n", "t.txt:2: byte 1"),
        ("t.jsonl", b'{"a": 1}\n{"a": ', "t.jsonl:2: not JSON"),
        ("t.jsonl", b'{"a": 1}\n[1]\n', "t.jsonl:2: a JSON list"),
        ("t.jsonl", b"null\n", "t.jsonl:1: a JSON null"),
        ("t.jsonl", b"[" * 100_000, "t.jsonl:1: JSON nested too deeply"),
        ("t.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "t.jsonl:1: not JSON"),
        ("t.parquet", b"PAR1 not really", "not a readable Parquet file"),
        ("t.xlsx", b"PK", "unknown kind of file '.xlsx'; known: .csv"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_in_one_short_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    with pytest.raises(DataError) as caught:
        read_file(written(tmp_path / name, content))
    message = str(caught.value).replace(str(tmp_path), "")
    assert says in message
    assert len(message) <= 300
    assert "\n" not in message


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.csv").mkdir()
    for name, says in {"pipe.csv": "a pipe", "folder.csv": "a folder", "none.csv": "no such file"}.items():
        with pytest.raises(DataError, match=says):
            read_file(tmp_path / name)
    with pytest.raises(DataError, match="cannot be opened"):
        read_file("a\0b.csv")


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    rows = read_file(written(tmp_path / "t.csv", "text\n" + "x" * 3_000_000 + "\n"))
    assert len(rows[0]["text"]) == 3_000_000


def test_a_long_path_does_not_hide_the_line(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100) / ("y" * 100)
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match=r"y/t.csv:2: 2 cells") as caught:
        read_file(written(folder / "t.csv", "a\n1,2\n"))
    assert len(str(caught.value)) < 300


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_cli.tasks.files._MAX_LINE", 100)
    with pytest.raises(DataError, match=r"t.txt:2: a line longer"):
        read_file(written(tmp_path / "t.txt", "short\n" + "x" * 101))


def test_lines_of_text_keep_their_count(tmp_path: Path) -> None:
    path = written(tmp_path / "t.txt", "one\n\n three \n")
    assert [row for _, row in stream(path, column="sentence")] == [
        {"sentence": "one"}, {"sentence": ""}, {"sentence": " three "},
    ]  # fmt: skip
    assert [where for where, _ in stream(path)] == [f"{path}:1", f"{path}:2", f"{path}:3"]


def test_a_stream_is_lazy(tmp_path: Path) -> None:
    rows = stream(written(tmp_path / "t.jsonl", '{"a": 1}\nbroken'))
    assert next(rows)[1] == {"a": 1}
    with pytest.raises(DataError, match=r"t.jsonl:2"):
        next(rows)


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b'\n {"a": 1}\n{"a": 2}\n', [(2, {"a": 1}), (3, {"a": 2})]),
        (b"\nplain {\n", [(1, {"text": ""}), (2, {"text": "plain {"})]),
        (b"\xef\xbb\xbf{}", [(1, {})]),
    ],
)
def test_standard_input_is_json_lines_or_text(content: bytes, rows: list[object]) -> None:
    assert list(read_stdin(io.BytesIO(content))) == rows


def test_empty_standard_input_is_refused() -> None:
    with pytest.raises(DataError, match="stdin: empty"):
        read_stdin(io.BytesIO(b""))


def test_minus_streams_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\nb")))
    assert list(stream("-")) == [("stdin:1", {"text": "a"}), ("stdin:2", {"text": "b"})]


def test_records_name_their_column(tmp_path: Path) -> None:
    assert list(read_records(written(tmp_path / "t.txt", "a"), column="x")) == [(1, {"x": "a"})]


def test_the_fingerprint_is_of_content_and_order_alone() -> None:
    rows = [{"a": "x", "b": 1}, {"a": "\ud800", "b": None}]
    turned = [dict(reversed(row.items())) for row in rows]
    assert Rows(rows, source="f").fingerprint == Rows(turned, source="g").fingerprint
    assert Rows(rows, source="f").fingerprint != Rows(rows[::-1], source="f").fingerprint


def test_selected_rows_keep_their_places(csv_file: Path) -> None:
    rows = read_file(csv_file).select([2, 0])
    assert rows.where(0) == f"{csv_file}:6"
    assert rows[1]["text"] == "fine"
    assert rows.columns == ("text", "label")


def test_an_error_about_many_long_names_is_short() -> None:
    names = [f"{number} {'long' * 20}" for number in range(99)]
    message = str(unknown("f" * 90, "label", "1 long" + "long" * 18, names))
    assert len(message) <= 300
    assert "Did you mean '1 long" in message


def test_overlap_and_repeats_count_rows() -> None:
    a = Rows([{"t": "x", "u": "1"}, {"t": "y", "u": "1"}], source="a")
    b = Rows([{"t": "x", "u": "2"}, {"t": "x", "u": "1"}, {"t": "x", "u": "1"}], source="b")
    assert overlap(a, b, ["t"]) == 3
    assert overlap(a, b, ["t", "u"]) == 2
    assert repeats(b, ["t", "u"]) == 1
