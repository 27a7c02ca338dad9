"""Several processes make the training of one: the same losses, metrics and adapter, and one folder."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from commands.conftest import FILMS, TINY, read_jsonl, write_films
from forked import Started

# 90 rows: of 12 micro-batches the last has two rows, and of the last step's four each process of four has one.
WORDS = ("train", *TINY, *FILMS, "train.accumulation=4", "task.data.train_limit=90", "train.log_every=1")
ROUNDING = 1e-6


def run(home: Path, forked, name: str, *words: str) -> Path:
    process = forked(*WORDS, *words, f"hydra.run.dir={name}", cwd=home)
    assert process.returncode == 0, process.stderr
    return home / name


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("distributed")
    write_films(home)
    return home


@pytest.fixture(scope="module")
def alone(home, forked) -> Path:
    return run(home, forked, "alone")


def by_loss(metrics: dict[str, float]) -> dict[str, float]:
    """These with a perplexity as the loss that it is the exponential of: what is rounded is that loss."""
    return {key: math.log(value) if key == "perplexity" else value for key, value in metrics.items()}


def same(one: Path, other: Path) -> None:
    """Hold two runs to the same figures, up to rounding."""
    ours, theirs = read_jsonl(one / "metrics.jsonl"), read_jsonl(other / "metrics.jsonl")
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        assert its == pytest.approx(mine, abs=ROUNDING, rel=1e-5), f"step {mine['step']}"
    known, found = (
        by_loss(json.loads((run / "run.json").read_text())["metrics"]["validation"]) for run in (one, other)
    )
    assert found == pytest.approx(known, abs=ROUNDING)
    predicted = [
        [row["prediction"] for row in read_jsonl(run / "predictions/validation.jsonl")] for run in (one, other)
    ]
    assert predicted[0] == predicted[1]
    kept, its = (load_file(run / "adapter/adapter_model.safetensors") for run in (one, other))
    assert kept.keys() == its.keys()
    for name, tensor in kept.items():
        torch.testing.assert_close(its[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "words",
    [
        ("device=ddp", "device.nproc=2"),
        ("device=fsdp", "device.nproc=2"),
        pytest.param(("device=ddp", "device.nproc=4"), marks=pytest.mark.slow),
        pytest.param(("device=fsdp", "device.nproc=4"), marks=pytest.mark.slow),
    ],
    ids=lambda words: "-".join(word.partition("=")[2] for word in words),
)
def test_accumulation_uneven_data_and_dropout_give_the_figures_of_one_process(words, home, alone, forked) -> None:
    found = run(home, forked, f"run{'-'.join(words)}".replace("=", ""), *words)
    same(alone, found)
    assert f"{words[1][-1]} processes" in json.loads((found / "run.json").read_text())["device"]


@pytest.mark.parametrize(
    "words",
    [
        ("device.nproc=2",),
        pytest.param(("device=fsdp", "device.nproc=2"), marks=pytest.mark.slow),
        pytest.param(("device.nproc=4",), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_without_dropout_one_micro_batch_is_cut_among_them_and_gives_the_same(words, home, forked) -> None:
    still = ("train.accumulation=1", "lora.dropout=0", "model.random={hidden_size:64,hidden_dropout_prob:0.0}")
    still += ("model.random.attention_probs_dropout_prob=0.0", "train.max_steps=12")
    known = run(home, forked, f"still{len(words)}{words[-1][-1]}", *still)
    same(known, run(home, forked, f"cut{len(words)}{words[-1][-1]}", *still, *words))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["adalora", "dylora", "vera", "lora_fa", "rslora", "qlora", "dora", "full", "head"])
def test_every_variant_does(variant, home, forked) -> None:
    words = (f"lora={variant}", "train.max_steps=4", "lora.targets=[query,value]")
    words = words[:2] if variant in ("full", "head") else words
    known = run(home, forked, f"{variant}1", *words)
    same(known, run(home, forked, f"{variant}2", *words, "device.nproc=2"))
    shards = run(home, forked, f"{variant}3", *words, "device=fsdp", "device.nproc=2") if variant in (
        *("adalora", "dylora", "vera", "lora_fa", "rslora", "head"),
    ) else known  # fmt: skip
    same(known, shards)


@pytest.mark.parametrize(("device", "model"), [("ddp", "tiny-gpt2"), ("fsdp", "tiny-t5")])
def test_answers_are_written_by_all_and_read_as_one(device, model, home, forked) -> None:
    words = [f"model={model}", "task=text_generation", *FILMS, "task.prompt={text}: ", "task.target={verdict}"]
    words += ["task.decode.max_new_tokens=4", "task.metrics=[exact_match,perplexity]", "train.max_steps=2"]
    words += ["train.batch_size=4", "train.accumulation=2", "train.eval_batch_size=8", "device.threads=1"]
    runs = []
    for name, more in ((f"{model}1", []), (f"{model}2", [f"device={device}", "device.nproc=2"])):
        process = forked("train", *words, *more, f"hydra.run.dir={name}", cwd=home)
        assert process.returncode == 0, process.stderr
        runs.append(home / name)
    same(*runs)


def test_a_rank_that_dies_ends_all_at_once_and_another_number_of_them_goes_on(home, alone, forked) -> None:
    words = (*WORDS, "train.save_every=2", "hydra.run.dir=killed")
    process = Started([*words, "device.nproc=2"], home, _second_dies_at_step_5)
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert time.monotonic() - began < 30
    assert "process 1 of 2, counted from 0, ended by signal 9" in said
    assert said.splitlines()[-1].startswith("lora train: another process of this training has ended")
    assert json.loads((home / "killed/run.json").read_text())["status"] == "failed"
    shutil.copytree(home / "killed", home / "killed4")
    resumed = forked(*words[:-1], "hydra.run.dir=killed", "resume=auto", cwd=home)
    assert re.search(r"resumes +killed from step 4", resumed.stderr), resumed.stderr
    same(alone, home / "killed")
    more = forked("resume", "run=killed4", "device.nproc=4", cwd=home)
    assert more.returncode == 0, more.stderr
    same(alone, home / "killed4")


def _second_dies_at_step_5() -> None:
    """In the first process: kill the second once four steps are saved."""
    from lora_cli import isolation
    from lora_cli.engine import checkpoint

    save, start, others = checkpoint.save, isolation.start, []

    def start_and_note(*args, **kwargs):
        others.append(start(*args, **kwargs))
        return others[-1]

    def save_and_kill(*args, **kwargs):
        folder = save(*args, **kwargs)
        if folder.name == "step-000004":
            os.kill(others[0].pid, signal.SIGKILL)
        return folder

    isolation.start, checkpoint.save = start_and_note, save_and_kill


def test_a_rank_that_fails_says_why(home) -> None:
    process = Started([*WORDS, "device.nproc=2", "hydra.run.dir=failing"], home, _second_fails)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "process 1 of 2, counted from 0, ended with exit code 1" in said
    assert "Traceback (most recent call last)" in said
    assert "RuntimeError: the second's own fault" in said


def _second_fails() -> None:
    from lora_cli import isolation, ranks

    start = isolation.start
    isolation.start = lambda work, *args, **kwargs: start(_failing, *args, **kwargs)
    assert ranks.isolation is isolation


def _failing(*args: object) -> None:
    from lora_cli import experiment, ranks

    def fail(*args: object) -> None:
        raise RuntimeError("the second's own fault")

    experiment.Experiment.rehearse = fail
    ranks._follow(*args)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_agreed_upon_and_costs_nothing(number, home, alone, forked) -> None:
    name = f"stopped{number}"
    words = (*WORDS, "device.nproc=2", f"hydra.run.dir={name}")
    process = Started(words, home, _Signal(number))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert "lora resume" in said.splitlines()[-1]
    assert not _members(home), "the other has ended as well"
    assert forked(*words, "resume=auto", cwd=home).returncode == 0
    same(alone, home / name)


class _Signal:
    """In the first process: a signal when the third step is told."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __call__(self) -> None:
        from lora_cli.runs.directory import RunDirectory

        append = RunDirectory.append_metrics

        def append_and_signal(folder: RunDirectory, row) -> None:
            append(folder, row)
            if row["step"] == 3:
                os.kill(os.getpid(), self._number)

        RunDirectory.append_metrics = append_and_signal


def _members(home: Path) -> list[int]:
    """Processes that are there yet and work in `home`."""
    time.sleep(0.5)
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == home:
                found.append(process.pid)
    return found


@pytest.mark.slow
def test_torchrun_does_the_same(home, alone) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lora_cli"]
    words = [*torchrun, *WORDS, "device=ddp", "hydra.run.dir=torchrun"]
    for more in ([], ["resume=auto"]):
        process = subprocess.run([*words, *more], cwd=home, capture_output=True, text=True, timeout=200)
        assert process.returncode == 0, process.stderr
    same(alone, home / "torchrun")
    evaluated = subprocess.run(
        [*torchrun, "eval", "run=torchrun"], cwd=home, capture_output=True, text=True, timeout=99
    )
    assert evaluated.returncode != 0
    assert "lora eval: WORLD_SIZE=2: torchrun is for lora train" in evaluated.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["lora=full", "lora.targets=[]"], "lora.variant=full: not with device.shard=true"),
        (["lora=dora"], "lora.variant=dora: not with device.shard=true"),
        (["lora=pissa"], "lora.init=pissa: not with device.shard=true"),
        (["lora=qlora"], "model.quantization=nf4: not with device.shard=true"),
        (["lora.bias=all"], "lora.bias=all: not with device.shard=true"),
        (["device.nproc=-1"], "device.nproc"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(words, says, home, call) -> None:
    answer = call(*WORDS, "device=fsdp", *words)
    assert answer.code == 2
    assert says in answer.err


def test_a_run_of_several_is_verified_and_made_again(home, forked) -> None:
    run(home, forked, "two", "device.nproc=2", "train.max_steps=4")
    checked = forked("verify", "run=two", cwd=home)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "equal to the last bit" in checked.stdout
    again = forked("rerun", "run=two", "hydra.run.dir=again", cwd=home)
    assert "training   equal to the last bit at every step" in again.stdout, again.stdout + again.stderr
