"""What people mistype, and the one line they get for it. `row` is the row of the fault table in docs or design."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from conftest import check_refusal

TINY = "model=tiny-bert"
OPTIONS = ", ".join(sorted(file.stem for file in (Path(__file__).parents[2] / "conf" / "lora").glob("*.yaml")))
CASES = [
    # row, words, what the line says
    (1, ["train", "train.lerning_rate=1e-4"], ["train.lerning_rate", "Did you mean train.lr?"]),
    (1, ["train", "lora.rnk=8"], ["Did you mean lora.r?", "lora train --help"]),
    (1, ["train", "r=8"], ["Did you mean lora.r?"]),
    (1, ["train", "taks=sst2"], ["Did you mean task?"]),
    (1, ["train", "+lora.rnk=8"], ["lora.rnk", "Did you mean lora.r?"]),
    (1, ["train", "++lora.x=4"], ["lora.x: no such key"]),
    (1, ["train", "hydra.run.dri=x"], ["Did you mean hydra.run.dir?"]),
    (1, ["train", "run=latest"], ["run: no such key"]),
    (1, ["train", "~nope"], ["nope"]),
    (1, ["eval", "run=latest", "lora.r=4"], ["run=latest", "no finished run"]),
    (1, ["--tain"], ["--tain: no such verb"]),
    (1, ["trian"], ["Did you mean train?", "train, resume, verify, rerun, eval"]),
    (1, ["TRAIN"], ["Did you mean train?"]),
    (1, ["train", "--foo"], ["--foo: no such flag", "--multirun"]),
    (1, ["train", "--lr", "1e-4"], ["--lr: no such flag. Did you mean train.lr=?"]),
    (1, ["runs", "--jsn"], ["Did you mean --json?", "--info, --json, --multirun"]),
    (1, ["runs", "--sort", "metric"], ["Did you mean sort=?"]),
    (1, ["train", "launcher=fused"], ["launcher: no such key. Did you mean hydra/launcher?", "train --help"]),
    (1, ["train", "sweeper=optuna"], ["Did you mean hydra/sweeper?"]),
    (1, ["train", "trials=4"], ["Did you mean hydra.sweeper.trials?"]),
    (1, ["train", "-m", "hydra.launcher.njobs=2", "seed=1,2"], ["Did you mean hydra.launcher.n_jobs?"]),
    (1, ["train", "-m", "hydra.launcher.adapters=2", "seed=1,2"], ["hydra/launcher=fused, not of isolated"]),
    (1, ["train", "-m", "hydra.sweeper.trails=2", "seed=1,2"], ["Did you mean hydra.sweeper.trials?"]),
    (1, ["train", "-m", "hydra.sweeper.trials=2", "seed=1,2"], ["hydra/sweeper=optuna, not of basic"]),
    (1, ["train", "-m", "hydra.launcher=fused", "seed=1,2"], ["is a group: write hydra/launcher=fused"]),
    (1, ["train", "-m", "hydra.sweeper=optuna", "seed=1,2"], ["is a group: write hydra/sweeper=optuna"]),
    (1, ["train", "--cfg"], ["--cfg", "job, hydra, all"]),
    (1, ["train", "--cfg", "jbo"], ["--cfg=jbo", "job, hydra, all"]),
    (1, ["train", "--config-dir"], ["--config-dir: needs a value"]),
    (1, ["train", "--config-dir", "nope"], ["nope", "not found"]),
    (1, ["train", "--config-name", "trian"], ["--config-name=trian", "fetch, import, infer and"]),
    (2, ["train", "train.max_steps=many"], ["train.max_steps=many", "a whole number"]),
    (2, ["train", "lora.r=8.5"], ["lora.r=8.5", "a whole number"]),
    (2, ["train", "lora.r="], ["lora.r: needs a value: a whole number"]),
    (2, ["train", "-m", "lora.r=2,,4"], ["lora.r=2,,4: a value is missing beside a comma"]),
    (2, ["train", "-m", "lora.r=2,x"], ["lora.r=x: a whole number"]),
    (2, ["train", "lora.r=null"], ["lora.r=null", "needs a value"]),
    (2, ["train", "train.lr=fast"], ["train.lr=fast", "a number"]),
    (2, ["train", "task.regression=maybe"], ["task.regression=maybe", "true or false"]),
    (2, ["train", "lora.targets=query"], ["lora.targets=query", "[a,b]"]),
    (2, ["train", "lora.rank_pattern={query:x}"], ["lora.rank_pattern.query", "a whole number"]),
    (2, ["train", "lora.r"], ["key=value"]),
    (2, ["train", "sst2"], ["key=value"]),
    (2, ["train", "lora.r=4,8"], ["lora.r=4,8", "-m"]),
    (2, ["train", "lora.targets=[re:(]"], ["lora.targets", "['...']"]),
    (2, ["train", "model.family=a=b"], ["model.family=a=b", "quotes"]),
    (2, ["train", "seed=${nope.x}"], ["seed", "nope.x"]),
    (2, ["train", "seed=${oc.env:NOT_SET_ANYWHERE}"], ["NOT_SET_ANYWHERE"]),
    (3, ["train", "-m", "hydra.launcher.n_jobs=0", "seed=1,2"], ["train: hydra.launcher.n_jobs=0: a whole number, 1"]),
    (3, ["train", "-m", "hydra/launcher=fused", "hydra.launcher.mixed=maybe", "seed=1"], ["mixed=maybe: true, false"]),
    (3, ["train", "-m", "train.lr=interval(1e-4,1e-2)"], ["an interval needs hydra/sweeper=optuna"]),
    (3, ["train", "lora.r=0"], ["lora.r=0", "from 1 to 4096"]),
    (3, ["train", "lora.rank_pattern={query:0}"], ["lora.rank_pattern.query=0", "from 1 to 4096"]),
    (3, ["train", "train.max_steps=-3"], ["train.max_steps=-3", "1 or more"]),
    (3, ["train", "train.lr=nan"], ["train.lr=nan", "above 0"]),
    (3, ["train", "train.lr=inf"], ["train.lr=inf", "above 0"]),
    (3, ["train", "lora.alpha=nan"], ["lora.alpha=nan", "above 0"]),
    (3, ["train", "seed=9223372036854775808"], ["seed=9223372036854775808", "9223372036854775807"]),
    (3, ["train", "seed=-1"], ["seed=-1", "from 0"]),
    (4, ["train", "task=sst"], ["task=sst", "Did you mean sst2?"]),
    (4, ["train", "model=robertabase"], ["Did you mean roberta-base?"]),
    (4, ["train", "lora=Lora"], ["Did you mean lora?", "adalora, dora, dylora, eva, full"]),
    (4, ["train", "lora=null"], ["lora=null", OPTIONS]),
    (4, ["train", "+model=bert-base"], ["model=NAME without the +"]),
    (4, ["train", "device=tpu"], ["device=tpu", "cpu, cuda, ddp, fsdp, mps"]),
    (4, ["train", "tracker=wandbb"], ["Did you mean wandb?"]),
    (4, ["train", "hydra/launcher=nowhere", "-m", "lora.r=2,4"], ["hydra/launcher=nowhere", "basic"]),
    (4, ["train", "-m", "hydra/launcher=ray", "seed=1,2"], ["pip install hydra-ray-launcher"]),
    (4, ["train", "task.metrics=[f2]"], ["task.metrics=f2", "accuracy, f1"]),
    (5, ["train", "+x._target_=os.system"], ["x: no such key"]),
    (5, ["train", "+model._target_=os.system"], ["model._target_", "no such key"]),
    (5, ["train", "++model.random._target_=os.system", TINY], ["_target_", "no such key"]),
    (9, ["train", "device=cpu", "device.precision=fp16"], ["device.precision=fp16", "device.name=cpu"]),
    (9, ["train", "task.regression=true"], ["task.metrics=accuracy", "task.regression"]),
    (9, ["train", "train.metric=f1"], ["train.metric=f1", "accuracy, loss, macro_f1"]),
    (9, ["train", "tracker=mlflow"], ["tracker=mlflow", "pip install"]),
    (9, ["fetch"], ["model=NAME, task=NAME or both"]),
    (9, ["eval"], ["run=FOLDER, or run=latest"]),
    (9, ["eval", "run="], ["run=FOLDER, or run=latest"]),
    (9, ["infer", "text=hi"], ["run=FOLDER, or run=latest"]),
    (9, ["eval", "run=nope"], ["run=nope", "no such run"]),
    (27, ["train", "model.path=./nope"], ["nope: no such folder"]),
    (27, ["train", "model.path=nope/"], ["neither a folder that exists nor a hub id"]),
    (27, ["train", "model.path=~/nope/such/folder"], ["nope/such/folder: no such folder"]),
    (27, ["train", "model.path=my models/a,b"], ["my models/a,b"]),
    (30, ["train", TINY, "lora.targets=[qeury]"], ["qeury", "Did you mean", "query"]),
    (30, ["train", TINY, "lora.rank_pattern={nope:4}"], ["nope"]),
    (30, ["train", TINY, "lora.modules_to_save=[nope]"], ["lora.modules_to_save=nope"]),
    (30, ["train", TINY, "model.random={hiden_size:3}"], ["hiden_size", "hidden_size"]),
    (32, ["train", TINY, "model.random={vocab_size:10}"], ["tokenizer does not fit the model", "10"]),
    (30, ["train", TINY, "model.family=bertt"], ["model.family=bertt", "bert"]),
]


def name(value: object) -> str | None:
    return " ".join(value)[:60] if isinstance(value, list) else f"row-{value}" if isinstance(value, int) else None


@pytest.mark.parametrize(("row", "words", "says"), CASES, ids=name)
def test_a_wrong_command_line_is_refused_in_one_line(row, words, says, refused, monkeypatch) -> None:
    if "tracker=mlflow" in words:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = refused(*words)
    assert all(text in line for text in says), line


@pytest.mark.parametrize(("row", "words", "says"), [case for case in CASES if case[0] in (1, 3, 4, 5)][::8], ids=name)
def test_a_process_of_its_own_says_the_same_at_once(row, words, says, lora, tmp_path: Path) -> None:
    started = time.monotonic()
    answer = lora(*words, cwd=tmp_path)
    assert answer.returncode == 2
    check_refusal(answer.stdout, answer.stderr, tmp_path)
    assert all(text in answer.stderr for text in says)
    assert time.monotonic() - started < 15, "a generous bound: such a line needs no torch"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("word", "says"), [("lora.r=4,x", "a whole number"), ("task=sst2,nope", "task=nope")])
def test_a_sweep_that_cannot_be_composed_runs_nothing(word, says, scratch, call) -> None:
    answer = call("train", TINY, "-m", word)
    assert answer.code == 2
    assert len(answer.err.splitlines()) == 1
    assert says in answer.err
    assert not list(Path("runs").glob("**/run.json"))


def test_a_file_in_the_place_of_a_sweeps_folder_names_its_key(scratch, call) -> None:
    Path("taken").write_text("")
    answer = call("train", TINY, "-m", "seed=1,2", "hydra.sweep.dir=taken")
    assert answer.code == 2
    assert answer.err.endswith("taken: a file is in the way; choose another hydra.sweep.dir\n")


def test_a_catastrophic_pattern_for_layers_ends_quickly(scratch, call) -> None:
    started = time.monotonic()
    answer = call("train", TINY, "task.data.train_limit=24", "lora.targets=['re:([a-z.]+)+!']")
    assert answer.code == 2, "row 30"
    assert time.monotonic() - started < 20


def test_a_missing_tracker_package_is_told_before_a_model_is_loaded(scratch, call, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lora_cli.experiment", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert call("train", "tracker=wandb").code == 2


def test_a_debugging_person_gets_the_traceback(scratch, call, monkeypatch) -> None:
    monkeypatch.setitem(os.environ, "LORA_DEBUG", "1")
    answer = call("train", "lora.r=0")
    assert "Traceback" in answer.err
    assert answer.err.splitlines()[-1].startswith("lora train: lora.r=0")
