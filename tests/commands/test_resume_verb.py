"""lora resume: a run goes on from its own folder alone, and only with what does not make another run of it."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from commands.conftest import FILMS, TINY, contents, read_jsonl, write_films
from commands.test_resume import files

STEADY = (
    "train",
    *TINY,
    *FILMS,
    "train.schedule=constant",
    "train.warmup=0",
    "train.eval_every=2",
    "train.log_every=2",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, forked) -> Path:
    home = tmp_path_factory.mktemp("steady")
    write_films(home)
    process = forked(*STEADY, "train.max_steps=4", "hydra.run.dir=run", cwd=home)
    assert process.returncode == 0, process.stderr
    return home / "run"


@pytest.fixture
def steady(trained, films) -> Path:
    """A finished run of four steps, all at one rate, in the folder `run`."""
    return shutil.copytree(trained, Path("run"))


def facts(run: Path = Path("run")) -> dict:
    return json.loads((run / "run.json").read_text())


def test_an_interrupted_run_goes_on_from_its_folder_wherever_that_is(films, call, before, tmp_path) -> None:
    words = (*STEADY, "train.max_steps=6")
    assert call(*words, "hydra.run.dir=whole").code == 0
    before("engine.micro_step:forward", 3, lambda: signal.raise_signal(signal.SIGTERM))
    assert call(*words).code == 143
    (run,) = Path("runs").glob("2*")
    moved = shutil.move(run, tmp_path / "elsewhere")
    answer = call("resume", f"run={moved}")
    assert answer.code == 0, answer.err
    assert "from step 3" in answer.err
    assert facts(moved)["status"] == "finished"
    assert contents(moved) == contents(Path("whole"))


@pytest.mark.slow
def test_latest_is_the_run_that_was_started_last(films, call, before) -> None:
    assert call(*STEADY, "train.max_steps=2").code == 0
    before("engine.micro_step:forward", 2, lambda: signal.raise_signal(signal.SIGINT))
    assert call(*STEADY, "train.max_steps=4", "seed=1").code == 130
    # They may have begun in the same second.
    (run,) = (path for path in Path("runs").glob("2*") if facts(path)["status"] == "interrupted")
    (run / "run.json").write_text(json.dumps(facts(run) | {"started": "2999-01-01T00:00:00+0000"}))
    answer = call("resume", "run=latest")
    assert answer.code == 0, answer.err
    assert f"{run} from step 2" in answer.err


def test_a_finished_run_says_its_figures_and_nothing_changes(steady, call) -> None:
    unchanged = files(steady)
    answer = call("resume", "run=run", "train.max_steps=4", "train.keep=2")
    assert answer.code == 0, "row 43"
    assert "accuracy" in answer.out
    assert files(steady) == unchanged


def test_a_run_at_one_rate_that_is_prolonged_equals_the_longer_one(steady, call) -> None:
    assert call(*STEADY, "train.max_steps=8", "hydra.run.dir=whole").code == 0
    answer = call("resume", "run=run", "train.max_steps=8")
    assert answer.code == 0, "row 42"
    assert "4 to 8 steps; the 4 done had the rates of the longer training" in answer.err
    assert contents(steady) == contents(Path("whole"))
    assert facts()["extended"] == [{"step": 4, "max_steps": 8}]
    assert facts()["steps"] == 8


def test_a_schedule_that_falls_is_said_to_be_another_one(films, call) -> None:
    assert call("train", *TINY, *FILMS, "train.max_steps=4", "hydra.run.dir=run").code == 0
    answer = call("resume", "run=run", "train.max_steps=8")
    assert answer.code == 0, answer.err
    assert "rates from step 5 on are those of the longer schedule, 4.00e-03 where it was 0.00e+00" in answer.err
    assert [row["step"] for row in read_jsonl(Path("run/metrics.jsonl")) if "train/loss" in row] == [4, 8]


@pytest.mark.slow
def test_a_prolonged_run_that_is_interrupted_goes_on_to_its_new_end(steady, call, before) -> None:
    before("engine.micro_step:forward", 2, lambda: signal.raise_signal(signal.SIGTERM))
    assert call("resume", "run=run", "train.max_steps=8").code == 143
    answer = call(*STEADY, "train.max_steps=4", "hydra.run.dir=run", "resume=auto")
    assert answer.code == 2
    assert answer.err == "lora train: run: was prolonged since; lora resume run=run continues it\n"
    answer = call("resume", "run=run")
    assert answer.code == 0, answer.err
    assert facts()["steps"] == 8
    assert call(*STEADY, "train.max_steps=8", "hydra.run.dir=whole").code == 0
    assert contents(steady) == contents(Path("whole"))


@pytest.mark.slow
def test_more_patience_lets_a_run_go_on_that_had_lost_it(films, call) -> None:
    words = ("train", *TINY, *FILMS, "train.eval_every=1", "train.max_steps=9", "train.lr=1e-6")
    assert call(*words, "train.patience=2", "hydra.run.dir=run").code == 0
    assert facts()["steps"] == 3
    answer = call("resume", "run=run", "train.max_steps=20")
    assert answer.code == 2
    assert "train.patience=2: it stopped at step 3, 2 scorings after its best" in answer.err.splitlines()[-1]
    assert call("resume", "run=run", "train.patience=4").code == 0
    assert facts()["steps"] == 5
    assert call(*words, "train.patience=4", "hydra.run.dir=whole").code == 0
    assert contents(Path("run")) == contents(Path("whole"))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("lora.r=4", "lora.r=4: is the run's own; what may change is train.max_steps, train.epochs, train.patience"),
        ("task=sst2", "task=sst2: is the run's own"),
        ("train.lr=1", "train.lr=1: is the run's own"),
        ("+seed=3", "seed=3: is the run's own"),
        ("train.max_steps=3", "train.max_steps=3: the run has 4; more can be asked for, not less"),
        ("train.epochs=9", "train.epochs=9.0: train.max_steps=4 decides"),
        ("train.patience=3", "train.patience=3: the run has none"),
        ("train.keep=0", "train.keep=0: a whole number"),
    ],
)
def test_what_would_make_another_run_of_it_is_refused(word, said, steady, call) -> None:
    unchanged = files(steady)
    answer = call("resume", "run=run", word)
    assert answer.code == 2, "row 42"
    assert answer.err.startswith(f"lora resume: {said}")
    assert len(answer.err) <= 301
    assert files(steady) == unchanged


@pytest.mark.parametrize(
    "damage", [{"task": {"kind": "nonsense"}}, {"train": {"lr": "much"}}, {"invented": 1}, {"seed": -1}]
)
def test_a_config_of_somebody_else_is_data(damage, steady, call) -> None:
    import yaml

    config = yaml.safe_load((steady / "config.yaml").read_text())
    (steady / "config.yaml").write_text(yaml.safe_dump(config | damage))
    answer = call("resume", "run=run", "train.max_steps=8")
    assert answer.code == 2, "row 6"
    assert len(answer.err.splitlines()) == 1
    assert "Traceback" not in answer.err


def test_there_must_be_a_run(scratch, call) -> None:
    answer = call("resume", "run=latest")
    assert (answer.code, answer.err) == (2, "lora resume: run=latest: no run under runs/ yet; lora train makes one\n")
