"""Commands as other programs meet them: a scheduler that ends them, readers that go away, warnings."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands.conftest import FILMS, TINY, Finished

COMMAND = [sys.executable, "-m", "lora_cli"]


def test_sigterm_ends_a_training_like_ctrl_c_and_it_can_be_continued(films: Path, lora) -> None:
    words = ["train", *TINY, *FILMS, "train.epochs=2000", "train.save_every=3", "hydra.run.dir=run"]
    process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not list(films.glob("run/checkpoints/step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert err.splitlines()[-1] == "lora train: terminated; lora resume run=run continues it"
    assert "Traceback" not in err
    assert list(films.glob("run/checkpoints/step-*"))
    facts = json.loads((films / "run" / "run.json").read_text())
    assert (facts["status"], facts["error"]) == ("interrupted", "Terminated")


def without_a_reader(*words: str, cwd: Path, streams: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command whose stdout or stderr (`streams`) is a pipe that nobody reads; the other one is captured."""
    read, write = os.pipe()
    os.close(read)
    kept = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | dict.fromkeys(streams.split(), write)
    try:
        return subprocess.run([*COMMAND, *words], cwd=cwd, stdin=subprocess.DEVNULL, timeout=200, check=False, **kept)
    finally:
        os.close(write)


def test_a_training_goes_on_when_nobody_reads_its_lines(films: Path) -> None:
    words = ["train", *TINY, *FILMS, "train.max_steps=12", "train.log_every=1", "hydra.run.dir=run"]
    answer = without_a_reader(*words, cwd=films, streams="stdout stderr")
    assert answer.returncode == 0
    assert json.loads((films / "run" / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train", "--cfg", "job"]], ids=" ".join)
def test_help_without_a_reader_ends_quietly(words: list[str], tmp_path: Path) -> None:
    answer = without_a_reader(*words, cwd=tmp_path, streams="stdout")
    assert (answer.returncode, answer.stderr) == (0, b"")


@pytest.mark.slow
def test_infer_without_a_reader_ends_quietly(finished: Finished) -> None:
    answer = without_a_reader("infer", "run=latest", "input=test.csv", cwd=finished.home, streams="stdout")
    assert (answer.returncode, answer.stderr) == (0, b"")


@pytest.mark.slow
def test_a_warning_of_python_is_one_line(finished: Finished, films: Path) -> None:
    adapter = shutil.copytree(finished.path / "adapter", films / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"invented_\x1b[31mlater": 1}))
    words = ["infer", "run=adapter", "task=text_classification", "model=tiny-bert", "model.random={hidden_size:64}"]
    answer = subprocess.run([*COMMAND, *words, "text=a"], capture_output=True, text=True, timeout=100, check=False)
    assert answer.returncode == 0, answer.stderr
    (line,) = answer.stderr.splitlines()
    assert line.startswith("lora infer: warning: ")
    assert line.endswith("unknown settings are ignored: invented_\\x1b[31mlater")
