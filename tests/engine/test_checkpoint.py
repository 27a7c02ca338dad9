"""Checkpoints: whole or not there, the newest valid one by its number, never one of something else."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.disk import atomic_folder
from lora_cli.engine import checkpoint as checkpoints
from lora_cli.engine.checkpoint import Checkpoint, Progress
from lora_cli.engine.optim import build_optimizer
from lora_cli.errors import RunError
from lora_cli.spec import TrainSpec

IDENTITY = {"configuration": "c", "data": "d", "base model": "b"}


def make(root: Path, *steps: int, keep: int = 5) -> None:
    for step in steps:
        state = Checkpoint(
            Progress(step=step, loss_sum=0.1 * step),
            {"A": torch.full((2, 3), float(step))},
            {"0.exp_avg": torch.ones(2), "0.step": torch.tensor(float(step))},
            best={"A": torch.zeros(2, 3)},
        )
        checkpoints.save(root, state, identity=IDENTITY, keep=keep, whole=atomic_folder)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    make(tmp_path, 7)
    found = checkpoints.load_newest(tmp_path, identity=IDENTITY)
    assert found is not None
    assert found.progress == Progress(step=7, loss_sum=0.1 * 7)
    assert torch.equal(found.trained["A"], torch.full((2, 3), 7.0))
    assert torch.equal(found.optimizer["0.step"], torch.tensor(7.0))
    assert found.best is not None


def test_the_newest_is_by_number_and_old_ones_go(tmp_path: Path) -> None:
    make(tmp_path, 90, 100, 1000, 1_000_000, keep=2)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-001000", "step-1000000"]
    assert checkpoints.load_newest(tmp_path, identity=IDENTITY).progress.step == 1_000_000


def test_there_is_none_in_an_empty_folder(tmp_path: Path) -> None:
    assert checkpoints.load_newest(tmp_path / "nothing", identity=IDENTITY) is None


@pytest.mark.parametrize("name", ["state.json", "trained.safetensors", "optimizer.safetensors", "best.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "delete"])
def test_damage_to_any_file_falls_back_to_the_one_before(tmp_path: Path, name: str, damage: str) -> None:
    make(tmp_path, 1, 2)
    file = tmp_path / "step-000002" / name
    content = file.read_bytes()
    match damage:
        case "cut":
            file.write_bytes(content[:-1])
        case "flip":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "empty":
            file.write_bytes(b"")
        case "delete":
            file.unlink()
    assert checkpoints.load_newest(tmp_path, identity=IDENTITY).progress.step == 1


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=200))
def test_a_garbled_manifest_is_no_checkpoint(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    root = tmp_path_factory.mktemp("run")
    make(root, 3)
    (root / "step-000003" / "manifest.json").write_bytes(content)
    assert checkpoints.load_newest(root, identity=IDENTITY) is None


FILES = ("state.json", "trained.safetensors", "optimizer.safetensors", "best.safetensors", "manifest.json")
DAMAGES = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "flip": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    "empty": lambda file: file.write_bytes(b""),
    "delete": lambda file: file.unlink(),
    "add": lambda file: file.with_name("more").write_bytes(b"?"),
}


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.integers(0, 2_000_000),
        st.none() | st.tuples(st.sampled_from(FILES), st.sampled_from(sorted(DAMAGES))),
        min_size=1,
        max_size=5,
    )
)
def test_the_newest_that_is_whole_is_taken(
    tmp_path_factory: pytest.TempPathFactory, steps: dict[int, tuple[str, str] | None]
) -> None:
    root = tmp_path_factory.mktemp("run")
    make(root, *sorted(steps))
    for step, damage in steps.items():
        if damage:
            DAMAGES[damage[1]](root / f"step-{step:06d}" / damage[0])
    found = checkpoints.load_newest(root, identity=IDENTITY)
    whole = [step for step, damage in steps.items() if not damage]
    assert (found and found.progress.step) == max(whole, default=None)


def test_a_checkpoint_half_written_has_no_name(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_folder(tmp_path / "step-000004") as folder:
            (folder / "state.json").write_text("{}")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changed", IDENTITY)
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, changed: str) -> None:
    make(tmp_path, 1)
    with pytest.raises(RunError, match=f"the {changed} changed"):
        checkpoints.load_newest(tmp_path, identity=IDENTITY | {changed: "other"})


def test_what_changed_is_told_with_both_values_if_they_are_words(tmp_path: Path) -> None:
    make(tmp_path, 1)
    with pytest.raises(RunError, match=r"the device \(None, now cpu, 2 threads\) changed"):
        checkpoints.load_newest(tmp_path, identity=IDENTITY | {"device": "cpu, 2 threads"})


@pytest.mark.parametrize(
    "state", [{}, {"identity": []}, {"identity": IDENTITY, "progress": {"steps": 1}, "scaler": {}}]
)
def test_a_whole_checkpoint_that_says_something_else_is_refused(state: dict, tmp_path: Path) -> None:
    make(tmp_path, 1)
    folder = tmp_path / "step-000001"
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = hashlib.sha256((folder / "state.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="not a checkpoint of this version"):
        checkpoints.load_newest(tmp_path, identity=IDENTITY)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["adamw", "paged_adamw"])
def test_an_optimizer_goes_on_as_if_nothing_had_happened(name: str) -> None:
    if name == "paged_adamw":
        pytest.importorskip("bitsandbytes")

    def optimizer(parameter: torch.Tensor) -> torch.optim.Optimizer:
        groups = [{"params": [parameter], "lr": 0.1, "weight_decay": 0.01}]
        return build_optimizer(groups, TrainSpec(optimizer=name))

    def step(parameter: torch.Tensor, optimizer: torch.optim.Optimizer, value: float) -> None:
        parameter.grad = torch.full_like(parameter, value)
        optimizer.step()

    first = torch.nn.Parameter(torch.ones(3))
    before = optimizer(first)
    step(first, before, 0.5)
    second = torch.nn.Parameter(first.detach().clone())
    after = optimizer(second)
    checkpoints.restore_optimizer(after, checkpoints.optimizer_tensors(before))
    for value in (0.3, -0.2):
        step(first, before, value)
        step(second, after, value)
    assert torch.equal(first, second)


def test_a_damaged_newest_one_makes_no_whole_one_go(tmp_path: Path) -> None:
    make(tmp_path, 3, 6)
    (tmp_path / "step-000006" / "state.json").write_text("{}")
    make(tmp_path, 4, keep=1)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-000004"]


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_a_pipe_among_its_files_is_damage_and_is_not_waited_for(tmp_path: Path, name: str) -> None:
    make(tmp_path, 1, 2)
    (tmp_path / "step-000002" / name).unlink()
    os.mkfifo(tmp_path / "step-000002" / name)
    assert checkpoints.load_newest(tmp_path, identity=IDENTITY).progress.step == 1


def test_a_manifest_nested_without_end_is_no_checkpoint(tmp_path: Path) -> None:
    make(tmp_path, 1)
    (tmp_path / "step-000001" / "manifest.json").write_text("[" * 100_000)
    assert checkpoints.load_newest(tmp_path, identity=IDENTITY) is None
