"""Small data, and one finished run that many tests read."""

from __future__ import annotations

import csv
import json
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import Completed

MODEL = ("model=tiny-bert", "model.random={hidden_size:64}")
TINY = (
    *MODEL,
    "task=text_classification",
    "task.label=verdict",
    "task.metrics=[accuracy,macro_f1]",
    "train.lr=7e-3",
    "lora.targets=[all-linear]",
    "train.batch_size=8",
    "train.epochs=3",
    "lora.dropout=0.1",
    "device.threads=1",
)
"""A training of a second or two, on the files of `write_films`."""
FILMS = ("task.data.train=train.csv", "task.data.validation=validation.csv", "task.data.test=test.csv")
COMPARED = ("adapter/adapter_model.safetensors", "metrics.jsonl", "predictions/validation.jsonl")
"""Files of a run that a kill must not change."""
BLOCK = """\
import os, socket

def refuse(*args, **kwargs):
    with open(os.environ["DIALLED"], "a") as file:
        file.write(f"{args} {kwargs}\\n")
    raise OSError("this test has no network")

connect = socket.socket.connect
# Processes of one machine may talk to each other.
socket.socket.connect = lambda s, to: connect(s, to) if s.family == socket.AF_UNIX else refuse(to)
socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


@dataclass(frozen=True)
class Finished:
    """A run made by the real command line, in the folder it was started from."""

    home: Path
    path: Path
    process: Completed
    env: dict[str, str]

    def facts(self) -> dict[str, Any]:
        return json.loads((self.path / "run.json").read_text())


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_csv(file: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_films(folder: Path) -> None:
    """train.csv, validation.csv and test.csv: short texts whose first letter tells the verdict, mostly."""
    for split, size in (("train", 96), ("validation", 30), ("test", 10)):
        rows = []
        for number in range(size):
            verdict = ("bad", "fair", "good")[number % 3]
            word = {"bad": "zzzz", "fair": "aa", "good": "mmmmmm"}[verdict if number % 7 else "fair"]
            rows.append({"id": number, "text": f"{word} {split} {number * 37 % 101}", "verdict": verdict})
        write_csv(folder / f"{split}.csv", rows)


def contents(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in COMPARED}


@pytest.fixture(scope="session")
def blocked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which every attempt to dial out fails, and is written down in the file DIALLED."""
    folder = tmp_path_factory.mktemp("blocked")
    (folder / "sitecustomize.py").write_text(BLOCK)
    paths = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": paths, "DIALLED": str(folder / "dialled.txt"), "HF_HUB_OFFLINE": "0"}


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, lora: Callable[..., Completed], blocked: dict[str, str]
) -> Finished:
    home = tmp_path_factory.mktemp("finished")
    write_films(home)
    extra = ("task.extra_splits=[test]", "tracker=tensorboard")
    process = lora("train", *TINY, *FILMS, *extra, cwd=home, env=blocked)
    assert process.returncode == 0, process.stderr
    return Finished(home, (home / "runs" / "latest").resolve(), process, blocked)


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory, forked: Callable[..., Completed]) -> Finished:
    """A run of a few steps on conversations: what it says makes no sense, but it says something."""
    home = tmp_path_factory.mktemp("talking")
    turns = [{"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "hello"))]
    (home / "chat.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 20)
    words = ["task=chat", "task.template=chatml", "model=tiny-llama", "task.data.train=chat.jsonl"]
    process = forked("train", *words, "train.max_steps=3", "device.threads=1", cwd=home)
    assert process.returncode == 0, process.stderr
    return Finished(home, (home / "runs" / "latest").resolve(), process, {})


@pytest.fixture
def films(scratch: Path) -> Path:
    """The current directory, with films in it."""
    write_films(scratch)
    return scratch


@pytest.fixture
def before(monkeypatch) -> Callable[..., None]:
    """Do something before the n-th call of a function of the package: before("engine.micro_step:forward", 3, act)."""

    def patch(name: str, number: int, act: Callable[[], object]) -> None:
        owner, _, attribute = f"lora_cli.{name}".replace(":", ".").rpartition(".")
        function, calls = getattr(pkgutil.resolve_name(owner), attribute), iter(range(1, 1000))

        def wrapped(*args, **kwargs):
            if next(calls) == number:
                act()
            return function(*args, **kwargs)

        monkeypatch.setattr(pkgutil.resolve_name(owner), attribute, wrapped)

    return patch
