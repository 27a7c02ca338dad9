"""lora data by the real command line: what it shows, what it writes, what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from commands.conftest import FILMS, MODEL, Completed

FILM_TASK = ("task=text_classification", "task.label=verdict", "task.metrics=[accuracy]")


def test_a_data_set_is_shown_and_its_figures_are_written(films: Path, lora, blocked) -> None:
    words = (*MODEL, *FILM_TASK, *FILMS, "task.max_length=12", "output=figures.json", "examples=2", "seed=4")
    answer: Completed = lora("data", *words, cwd=films, env=blocked)
    assert answer.returncode == 0, answer.stderr
    assert [line.split()[0] for line in answer.stderr.splitlines()] == ["task", "model"]
    for title in ("2 of 96 train examples", "rows", "tokens before cutting", "labels", "padding in batches of 32"):
        assert title in [line.strip() for line in answer.stdout.splitlines()]
    assert "\x1b" not in answer.stdout
    figures = json.loads((films / "figures.json").read_text())
    assert figures["splits"]["test"]["rows"] == 10
    assert figures["splits"]["train"]["labels"] == {"bad": 32, "fair": 32, "good": 32}
    with (films / "train.csv").open() as file:
        # A token a byte, and one at either end.
        assert figures["splits"]["train"]["parts"]["text"]["cut"] == sum(
            len(row["text"]) + 2 > 12 for row in csv.DictReader(file)
        )
    assert figures["warnings"][0] in " ".join(answer.stdout.split())
    assert {path.name for path in films.iterdir()} == {"figures.json", "train.csv", "validation.csv", "test.csv"}
    assert not Path(blocked["DIALLED"]).exists()


def test_the_hint_that_is_given_helps(films: Path, call) -> None:
    words = ("data", *MODEL, *FILM_TASK, *FILMS, "output=figures.json")
    assert call(*words, "task.max_length=12").code == 0
    (cut,) = [line for line in json.loads(Path("figures.json").read_text())["warnings"] if "task.max_length=" in line]
    hint = next(word.rstrip(":") for word in cut.split() if word.startswith("task.max_length="))
    assert call(*words, hint).code == 0
    assert json.loads(Path("figures.json").read_text())["warnings"] == []


def test_every_kind_of_task_can_be_shown(scratch: Path, call) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = [{"prompt": f"p {n}", "target": f"t {n}", "text": f"x {n}", "messages": talk} for n in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for words in (
        ("task=text_generation", "model=tiny-gpt2"),
        ("task=text_generation", "model=tiny-t5"),
        ("task=chat", "task.template=plain", "model=tiny-llama"),
        ("task=language_modeling", "model=tiny-gpt2"),
    ):
        answer = call("data", *words, "task.data.train=rows.jsonl", "task.decode.max_new_tokens=8")
        assert (answer.code, answer.out.count("learns")) == (0, 3), answer.err
        assert ("train.packing" in answer.out) == ("model=tiny-t5" not in words)
        assert "no test" in answer.err


def test_what_cannot_be_shown_is_refused_in_one_line(refused) -> None:
    line = refused("data", "task=language_modeling", "model=tiny-bert", "task.data.train=nope.csv")
    assert "nope.csv" in line
    assert "output=" in refused("data", "model=tiny-bert", "output=.")
    assert "examples=-1" in refused("data", "model=tiny-bert", "examples=-1")
