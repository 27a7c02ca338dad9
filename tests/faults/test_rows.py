"""Rows of the fault table that are shown nowhere else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import forked
from commands.conftest import FILMS, TINY, write_films
from conftest import Answer
from faults import harms
from faults.training import WORDS, assert_equal, resumed

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY")


def test_no_file_of_a_run_holds_a_token(scratch: Path, call: Callable[..., Answer], monkeypatch) -> None:
    for name in TOKENS:
        monkeypatch.setenv(name, f"planted-{name}")
    write_films(scratch)
    answer = call("train", *TINY, *FILMS, "train.max_steps=2", "tracker=tensorboard", "hydra.run.dir=run")
    assert answer.code == 0, answer.err
    assert call("eval", "run=run").code == 0
    files = [file for file in scratch.rglob("*") if file.is_file()]
    assert len(files) > 15
    assert [str(file) for file in files if b"planted-" in file.read_bytes()] == []
    assert "planted-" not in answer.out + answer.err


def test_a_lock_dies_with_its_process(tmp_path: Path, whole: Path) -> None:
    write_films(tmp_path)
    killed = forked.run([*WORDS, "hydra.run.dir=run"], tmp_path, harm=partial(harms.die_in_save, 3))
    assert killed.returncode == -9
    assert (tmp_path / "run/.lock").exists()
    resumed(tmp_path)
    assert_equal(tmp_path / "run", whole)


POOR = {
    "nothing but a path": {},
    "no home": {"HOME": "/nonexistent"},
    "plain ASCII": {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "a dumb terminal": {"TERM": "dumb", "COLUMNS": "1"},
}


@pytest.mark.slow
@pytest.mark.parametrize("env", POOR.values(), ids=POOR)
def test_a_poor_environment_is_enough(env: dict[str, str], tmp_path: Path) -> None:
    write_films(tmp_path)
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-m", "lora_cli", *WORDS, "hydra.run.dir=run"],
        cwd=tmp_path,
        env=kept | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout + done.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "finished"
