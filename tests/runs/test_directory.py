"""Run folders: names, atomic files, and refusal of what a run may not hold."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import yaml

from lora_cli.config import to_plain
from lora_cli.disk import write_atomic
from lora_cli.errors import RunError
from lora_cli.runs.directory import RunDirectory, read_json, read_saved_config, signature, write_json
from lora_cli.spec import ClassificationSpec, LoraSpec, ModelSpec, TrainRun, TrainSpec


def config(**changes: object) -> dict:
    task, model = ClassificationSpec(name="sst2"), ModelSpec(name="minilm")
    return to_plain(dataclasses.replace(TrainRun(task=task, model=model), **changes))


def test_a_run_is_named_by_day_task_model_rank_and_signature(scratch: Path) -> None:
    run = RunDirectory.create(config(), directory=None, overrides=["lora.r=8"])
    day, task, model, rank, digest = run.path.name.split("_")
    assert (len(day), task, model, rank) == (10, "sst2", "minilm", "r8")
    assert digest == signature(config())
    assert (run.path / "overrides.txt").read_text() == "lora.r=8\n"
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == config()


def test_the_same_run_again_gets_a_folder_of_its_own(scratch: Path) -> None:
    paths = [RunDirectory.create(config(), directory=None, overrides=[]).path.name for _ in range(3)]
    assert paths[1:] == [f"{paths[0]}-2", f"{paths[0]}-3"]


def test_a_folder_that_holds_a_run_is_not_written_over(scratch: Path) -> None:
    RunDirectory.create(config(), directory=Path("mine"), overrides=[])
    with pytest.raises(RunError, match="mine: holds a run already"):
        RunDirectory.create(config(), directory=Path("mine"), overrides=[])


def test_a_file_in_the_way_is_kept(scratch: Path) -> None:
    Path("mine").write_text("precious")
    with pytest.raises(RunError, match="a file is in the way"):
        RunDirectory.create(config(), directory=Path("mine"), overrides=[])
    assert Path("mine").read_text() == "precious"


def test_the_signature_counts_what_changes_results_and_nothing_else() -> None:
    same = [config(resume="auto"), config(train=TrainSpec(log_every=3)), config(train=TrainSpec(save_every=7, keep=2))]
    other = [config(seed=1), config(lora=LoraSpec(r=4)), config(train=TrainSpec(eval_every=5))]
    assert {signature(c) for c in same} == {signature(config())}
    assert len({signature(c) for c in [config(), *other]}) == 4


def test_latest_points_to_the_last_finished_run(scratch: Path) -> None:
    first = RunDirectory.create(config(), directory=None, overrides=[])
    second = RunDirectory.create(config(seed=1), directory=None, overrides=[])
    first.finish(data={}, metrics={})
    assert Path("runs/latest").resolve() == first.path.resolve()
    second.finish(data={}, metrics={})
    assert Path("runs/latest").resolve() == second.path.resolve()
    assert second.facts()["status"] == "finished"


def test_metrics_are_cut_back_to_a_step_and_a_torn_line_goes(scratch: Path) -> None:
    run = RunDirectory.create(config(), directory=None, overrides=[])
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "train/loss": float("nan") if step == 1 else 0.5})
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n{"step": "x"}\n{}\n{"step": 1, "\xc3')
    run.cut_metrics(2)
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "train/loss": None}, {"step": 2, "train/loss": 0.5}]


def test_a_failed_write_leaves_the_old_file_whole(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(Path("a"), "old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomic(Path("a"), "new")
    assert Path("a").read_text() == "old"
    assert [path.name for path in Path().iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("a: !!python/object/apply:os.system [id]\n", "tags"),
        ("lora: {_target_: os.system}\n", "_target_ is not allowed"),
        ("task: {name: '${oc.env:HOME}'}\n", "interpolation"),
        ("- a\n- b\n", "no mapping"),
        ("", "no mapping"),
        ("a: [1\n", "not readable"),
        ("a: " + "[" * 5000, "not readable"),
        ("[" + "x," * 60_000 + "x]", "more than 50,000 keys"),
        ("x" * (1 << 20) + ": 1", "at most"),
    ],
)
def test_a_config_from_outside_is_data_or_refused(scratch: Path, text: str, reason: str) -> None:
    Path("config.yaml").write_text(text)
    with pytest.raises(RunError, match=reason):
        read_saved_config(Path())


def test_a_config_that_is_no_regular_file_is_not_opened(scratch: Path) -> None:
    os.mkfifo("config.yaml")
    with pytest.raises(RunError, match="not a regular file"):
        read_saved_config(Path())


def test_code_of_a_checkpoint_is_never_run_because_a_run_says_so(scratch: Path) -> None:
    Path("config.yaml").write_text("model: {name: x, trust_remote_code: true}\n")
    assert read_saved_config(Path())["model"]["trust_remote_code"] is False


def test_a_run_of_a_newer_version_is_refused(scratch: Path) -> None:
    run = RunDirectory.create(config(), directory=None, overrides=[])
    write_json(run.path / "run.json", {"format": 99})
    with pytest.raises(RunError, match="made by a newer lora"):
        run.facts()


@pytest.mark.parametrize("text", ["", "[1]", "{", "nul", "[" * 100_000])
def test_run_json_that_is_no_object_is_refused(scratch: Path, text: str) -> None:
    Path("run.json").write_text(text)
    with pytest.raises(RunError, match=r"run\.json"):
        read_json(Path("run.json"))


def test_a_path_that_leads_nowhere_from_here_is_taken_from_where_the_run_was_started(scratch, monkeypatch) -> None:
    spec = config()
    spec["model"]["path"], spec["task"]["data"]["train"], spec["task"]["data"]["test"] = "base", "train.csv", "gone.csv"
    (scratch / "base").mkdir()
    (scratch / "train.csv").touch()
    path = RunDirectory.create(spec, directory=None, overrides=[]).path.resolve()
    assert read_saved_config(path)["model"]["path"] == "base"
    (scratch / "elsewhere").mkdir()
    monkeypatch.chdir(scratch / "elsewhere")
    saved = read_saved_config(path)
    assert saved["model"]["path"] == str(scratch / "base")
    assert saved["task"]["data"]["train"] == str(scratch / "train.csv")
    assert saved["task"]["data"]["test"] == "gone.csv"
    Path("train.csv").touch()
    assert read_saved_config(path)["task"]["data"]["train"] == "train.csv"


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), "interrupted"), (ValueError("x"), "failed")])
def test_how_a_run_stopped_is_in_its_status(error: BaseException, status: str, scratch: Path) -> None:
    run = RunDirectory.create(config(), directory=None, overrides=[])
    run.stopped(error)
    assert run.facts()["status"] == status
    assert type(error).__name__ in run.facts()["error"]


@pytest.mark.parametrize("name", ["adapter", "tokenizer/vocab.txt", "eval", "checkpoints/step-000001/x", ".lock"])
def test_a_run_with_links_in_it_is_refused(name: str, scratch: Path) -> None:
    run = RunDirectory.create(config(), directory=None, overrides=[])
    run.check_plain()
    (run.path / name).parent.mkdir(parents=True, exist_ok=True)
    (run.path / name).symlink_to(scratch)
    with pytest.raises(RunError, match=f"{name}: not a regular file"):
        run.check_plain()


def test_what_a_killed_process_left_goes_when_the_run_is_taken_up_again(scratch: Path) -> None:
    run = RunDirectory.create(config(), directory=None, overrides=[])
    for name in (".run.json.1.tmp", "checkpoints/.step-000003.1.tmp/state.json", "predictions/.a.jsonl.1.tmp"):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).touch()
    with run.held():
        assert [file.name for file in run.path.rglob("*.tmp*")] == []
