"""A small training to be harmed, and what must be true of it in the end."""

from __future__ import annotations

import json
from pathlib import Path

import forked
from commands.conftest import FILMS, TINY

__all__ = ["EQUAL", "WORDS", "assert_equal", "assert_one_line", "resumed"]

WORDS = (
    *("train", *TINY, *FILMS, "train.max_steps=6", "train.save_every=2", "train.eval_every=2", "train.log_every=1"),
    *("train.keep=2", "model.dropout=0.1"),
)
"""Six steps, three checkpoints, each with the best weights."""
EQUAL = ("adapter/adapter_model.safetensors", "metrics.jsonl", "predictions/validation.jsonl")


def resumed(home: Path, run: str = "run") -> str:
    """Take the training up again and let it end; what it said."""
    done = forked.run([*WORDS, f"hydra.run.dir={run}", "resume=auto"], home)
    assert done.returncode == 0, done.stderr
    return done.stderr


def assert_equal(run: Path, whole: Path) -> None:
    """Both hold the same figures, weights and predictions, to the last bit."""
    for name in EQUAL:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert (
        json.loads((run / "run.json").read_text())["metrics"]
        == (json.loads((whole / "run.json").read_text())["metrics"])
    )
    assert not [file for file in run.rglob(".*") if file.name != ".lock"]


def assert_one_line(err: str, *words: str) -> None:
    """The last line says so, in no more than a line."""
    line = err.splitlines()[-1]
    assert line.startswith("lora train: "), err
    assert all(word in line for word in words), line
    assert len(line) <= 300
    assert "Traceback" not in err
