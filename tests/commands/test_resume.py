"""A training that is killed and continued ends as if nothing had happened, or is refused."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from pathlib import Path

import pytest

from commands.conftest import FILMS, TINY, contents, read_jsonl, write_csv, write_films
from commands.test_writing import SMALL, write_things
from forked import Started

LONG = (
    *TINY,
    *FILMS,
    "model.dropout=0.1",
    "train.batch_size=2",
    "train.accumulation=2",
    "train.save_every=3",
    "train.log_every=2",
)
"""72 steps in 3 epochs, with both kinds of dropout."""


def start(home: Path, *words: str) -> Started:
    return Started(["train", *LONG, "hydra.run.dir=run", *words], home)


def newest_step(home: Path) -> int:
    return max((int(path.name[5:]) for path in home.glob("run/checkpoints/step-*")), default=0)


def stop_after(process: Started, home: Path, step: int, how: signal.Signals) -> tuple[str, str]:
    """Send `how` as soon as a checkpoint of `step` or later is there; returns stdout and stderr."""
    deadline = time.monotonic() + 100
    while newest_step(home) < step and process.returncode is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(how)
    return process.communicate(timeout=60)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, forked) -> dict[str, object]:
    """kill -9 in the first epoch, Ctrl-C in the second, and then to the end."""
    # On a machine with much else to do, a training this short can end before the signal reaches it: then again.
    for _ in range(5):
        home = tmp_path_factory.mktemp("interrupted")
        write_films(home)
        killed = start(home)
        stop_after(killed, home, 5, signal.SIGKILL)
        after_kill = newest_step(home)
        stopped = start(home, "resume=auto")
        _, err = stop_after(stopped, home, 30, signal.SIGINT)
        if killed.returncode and stopped.returncode:
            break
    after_stop, status = newest_step(home), json.loads((home / "run" / "run.json").read_text())["status"]
    # A torn last line, as a full disk or a power cut leaves it.
    with (home / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "tra')
    last = forked("train", *LONG, "hydra.run.dir=run", "resume=auto", cwd=home)
    return {
        "home": home,
        "codes": [killed.returncode, stopped.returncode, last.returncode],
        "steps": [after_kill, after_stop],
        "err": err,
        "status": status,
        "last": last.stderr,
    }


def test_a_killed_training_resumes_and_an_interrupted_one_says_one_line(interrupted) -> None:
    assert interrupted["codes"] == [-signal.SIGKILL, 130, 0], interrupted
    assert 0 < interrupted["steps"][0] < 36 <= interrupted["steps"][1] + 36 < 108
    assert interrupted["status"] == "interrupted"
    assert interrupted["err"].splitlines()[-1].endswith("interrupted; lora resume run=run continues it")
    assert "Traceback" not in interrupted["err"]
    assert "from step" in interrupted["last"]


def test_an_interrupted_training_is_bit_equal_to_an_uninterrupted_one(interrupted, films, call) -> None:
    answer = call("train", *LONG, "hydra.run.dir=whole")
    assert answer.code == 0, answer.err
    run = interrupted["home"] / "run"
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl", "predictions/validation.jsonl"):
        assert (run / name).read_bytes() == (films / "whole" / name).read_bytes(), name
    steps = [row["step"] for row in read_jsonl(run / "metrics.jsonl") if "train/loss" in row]
    assert steps == list(range(2, 73, 2))


@pytest.fixture
def short(films, call):
    """A run of a few steps in the folder `run`, as the words that made it."""
    words = ["train", *TINY, *FILMS, "train.max_steps=4", "train.save_every=2", "hydra.run.dir=run"]
    answer = call(*words)
    assert answer.code == 0, answer.err
    return words


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_resuming_a_finished_run_changes_nothing_and_says_its_figures(short, call) -> None:
    before = files(Path("run"))
    answer = call(*short, "resume=auto")
    assert answer.code == 0, "row 43"
    assert "accuracy" in answer.out
    assert files(Path("run")) == before


def unfinish() -> None:
    facts = json.loads(Path("run/run.json").read_text())
    Path("run/run.json").write_text(json.dumps(facts | {"status": "running"}))


def test_a_run_is_not_continued_with_another_configuration(short, call) -> None:
    before = files(Path("run"))
    answer = call(*short, "resume=auto", "lora.r=4", "train.lr=1")
    assert answer.code == 2, "row 42"
    assert "differs in lora.r, train.lr" in answer.err
    assert files(Path("run")) == before


def test_a_run_is_not_continued_on_other_data(short, call) -> None:
    unfinish()
    write_csv(Path("train.csv"), [{"text": f"new {n}", "verdict": ("bad", "fair", "good")[n % 3]} for n in range(96)])
    answer = call(*short, "resume=auto")
    assert answer.code == 2, "row 26"
    assert answer.err.splitlines()[-1].endswith("the data changed since; start a new run")


@pytest.mark.parametrize("damage", [b"", b"short", None], ids=["emptied", "truncated", "deleted"])
def test_a_damaged_checkpoint_is_passed_over_and_the_end_is_the_same(damage, short, call) -> None:
    adapter = Path("run/adapter/adapter_model.safetensors").read_bytes()
    unfinish()
    (newest,) = Path("run/checkpoints").glob("step-*")
    file = newest / "optimizer.safetensors"
    file.unlink() if damage is None else file.write_bytes(damage)
    answer = call(*short, "resume=auto")
    assert answer.code == 0, answer.err
    assert "resumes" not in answer.err
    assert Path("run/adapter/adapter_model.safetensors").read_bytes() == adapter


def test_a_folder_in_use_is_refused_and_left_alone(short, call) -> None:
    unfinish()
    before = files(Path("run"))
    with Path("run/.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = call(*short, "resume=auto")
    assert answer.code == 2, "row 41"
    assert "in use by another process" in answer.err.splitlines()[-1]
    assert files(Path("run")) == before


def test_without_a_run_to_continue_a_new_one_begins(films, call) -> None:
    answer = call("train", *TINY, *FILMS, "train.max_steps=2", "resume=auto")
    assert answer.code == 0, answer.err
    assert json.loads(Path("runs/latest/run.json").read_text())["status"] == "finished"


def test_clocks_and_file_times_decide_nothing(films, call) -> None:
    words = ["train", *TINY, *FILMS, "train.max_steps=4", "train.save_every=2", "train.keep=2", "hydra.run.dir=run"]
    assert call(*words).code == 0
    unfinish()
    os.utime("run/checkpoints/step-000004", (0, 0))
    answer = call(*words, "resume=auto")
    assert answer.code == 0, "row 45"
    assert "from step 4" in answer.err


def test_a_file_in_the_way_of_the_run_folder_is_kept(films, call) -> None:
    Path("run").write_text("mine")
    answer = call("train", *TINY, *FILMS, "hydra.run.dir=run")
    assert answer.code in (1, 2), "row 40"
    assert "run" in answer.err.splitlines()[-1]
    assert "Traceback" not in answer.err
    assert Path("run").read_text() == "mine"


class Killed(BaseException):
    """What no handler of ours expects."""


def kill() -> None:
    raise Killed


COMMON = ("train.epochs=3", "train.accumulation=2", "train.save_every=2", "train.log_every=2", "train.eval_every=3")
KINDS = {
    "adalora": (*TINY, *FILMS, "lora=adalora", "lora.r=6", "lora.adalora.target_r=3", "train.schedule=cosine"),
    "dylora": (*TINY, *FILMS, "lora=dylora", "lora.r=4", "train.schedule=constant"),
    "dora": (*TINY, *FILMS, "lora=dora", "lora.r=4"),
    "writing": (*SMALL, "model=tiny-gpt2", "train.batch_size=1", "model.dropout=0.1", "train.metric=bleu"),
}
"""18 steps of two micro-steps, the three epochs of each with dropout; `writing` answers its prompts at each scoring."""


@pytest.mark.parametrize(
    "kind", ["writing", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "writing")]
)
def test_killed_in_the_middle_of_a_step_of_the_third_epoch_the_end_is_the_same(kind, films, call, before) -> None:
    write_things(films)
    words = ("train", *KINDS[kind], "lora.dropout=0.1", *COMMON)
    assert call(*words, "hydra.run.dir=whole").code == 0
    before("engine.micro_step:forward", 30, kill)
    with pytest.raises(Killed):
        call(*words, "hydra.run.dir=run")
    assert newest_step(films) == 14
    answer = call(*words, "hydra.run.dir=run", "resume=auto")
    assert answer.code == 0, answer.err
    assert "from step 14" in answer.err
    assert contents(Path("run")) == contents(Path("whole"))
    metrics = [json.loads(Path(run, "run.json").read_text())["metrics"] for run in ("run", "whole")]
    assert metrics[0] == metrics[1]
