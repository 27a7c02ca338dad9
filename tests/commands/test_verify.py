"""lora verify and lora rerun: a run that holds says so line by line; one that was touched names what and where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from commands.conftest import FILMS, TINY, contents, read_jsonl, write_films
from commands.test_resume import files

WORDS = ("train", *TINY, *FILMS, "train.max_steps=6", "train.eval_every=3", "train.log_every=2")
KEPT = ("train.save_every=2", "train.keep=3", "train.schedule=constant", "train.warmup=0", "task.extra_splits=[test]")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, forked) -> Path:
    home = tmp_path_factory.mktemp("trained")
    write_films(home)
    process = forked(*WORDS, *KEPT, "hydra.run.dir=run", cwd=home)
    assert process.returncode == 0, process.stderr
    return home / "run"


@pytest.fixture
def run(trained, films) -> Path:
    return shutil.copytree(trained, Path("run"))


def table(out: str) -> dict[str, tuple[str, str]]:
    """Name of each check → its verdict and what was found."""
    return {line[:20].strip(): (line[22:29].strip(), line[31:]) for line in out.splitlines()}


def facts(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def change(run: Path, **values: object) -> None:
    (run / "run.json").write_text(json.dumps(facts(run) | values))


def test_a_run_that_holds_says_so_and_is_left_alone(run, call) -> None:
    before = files(run)
    answer = call("verify", "run=run", "verify.steps=3")
    assert answer.code == 0, answer.out + answer.err
    found = table(answer.out)
    assert {verdict for verdict, _ in found.values()} == {"holds"}
    assert list(found) == [
        *("files", "checkpoints", "data", "base model", "versions", "losses", "weights"),
        *("validation metrics", "test metrics"),
    ]
    assert found["losses"][1] == "steps 1 to 4 again: metrics equal to the last bit"
    assert found["weights"][1] == "trained tensors of step 4 equal to the last bit"
    assert files(run) == before


@pytest.mark.slow
def test_the_last_steps_from_a_checkpoint(run, call) -> None:
    answer = call("verify", "run=run", "verify.start=checkpoint")
    assert answer.code == 0, answer.out + answer.err
    found = table(answer.out)
    assert found["losses"][1] == "steps 5 to 6 again: metrics equal to the last bit"
    assert found["weights"][1] == "trained tensors of step 6 equal to the last bit"


def test_one_checkpoint_is_not_enough_for_that(run, call) -> None:
    for step in (2, 4):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    answer = call("verify", "run=run", "verify.start=checkpoint")
    assert answer.code == 1
    assert "train.keep=2 keeps them" in table(answer.out)["training"][1]


def test_a_loss_that_is_another_is_named_with_its_step(run, call) -> None:
    rows = read_jsonl(run / "metrics.jsonl")
    (row,) = (row for row in rows if row["step"] == 4 and "train/loss" in row)
    row["train/loss"] += 0.125
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = call("verify", "run=run", "verify.steps=6")
    assert answer.code == 1
    found = table(answer.out)
    assert found["files"] == ("differs", "metrics.jsonl changed")
    assert found["losses"][0] == "differs"
    assert "step 4: train/loss" in found["losses"][1]
    assert "1.2e-01 apart" in found["losses"][1]
    assert found["weights"][0] == "holds"
    assert "2 of 9 checks do not hold" in answer.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("adapter/adapter_model.safetensors", "files"),
        ("predictions/test.jsonl", "files"),
        ("overrides.txt", "files"),
        ("checkpoints/step-000004/trained.safetensors", "checkpoints"),
    ],
)
def test_a_byte_that_changed_is_found(name, check, run, call) -> None:
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    answer = call("verify", "run=run", "verify.steps=0")
    assert answer.code == 1
    assert table(answer.out)[check][0] == "differs"


def test_files_that_are_gone_or_new_are_named(run, call) -> None:
    (run / "predictions" / "test.jsonl").rename(run / "predictions" / "other.jsonl")
    answer = call("verify", "run=run", "verify.steps=0")
    assert answer.code == 1
    assert table(answer.out)["files"][1] == "predictions/other.jsonl new, predictions/test.jsonl missing"


def test_metrics_that_are_not_reached_are_named(run, call) -> None:
    metrics = facts(run)["metrics"]
    metrics["test"]["accuracy"] += 0.25
    change(run, metrics=metrics)
    answer = call("verify", "run=run", "verify.steps=0")
    assert answer.code == 1
    found = table(answer.out)
    assert (found["validation metrics"][0], found["test metrics"][0]) == ("holds", "differs")
    assert "2.5e-01 apart" in found["test metrics"][1]


def test_other_libraries_are_named_and_allowed_for(run, call) -> None:
    change(run, versions=facts(run)["versions"] | {"torch": "1.13"})
    answer = call("verify", "run=run", "verify.steps=2")
    assert answer.code == 1
    found = table(answer.out)
    assert found["versions"][1].startswith("torch 1.13, now")
    assert "within 0.01" in found["losses"][1]
    assert [name for name, (verdict, _) in found.items() if verdict == "differs"] == ["files"]


def test_other_data_is_named(run, call) -> None:
    text = Path("train.csv").read_text()
    Path("train.csv").write_text(text.replace("train 0", "train zero"))
    answer = call("verify", "run=run", "verify.steps=0")
    assert answer.code == 1
    assert table(answer.out)["data"] == ("differs", "train changed since")


def test_a_run_that_is_not_finished_is_refused(run, call) -> None:
    change(run, status="interrupted")
    for verb in ("verify", "rerun"):
        answer = call(verb, "run=run")
        assert answer.code == 2
        assert answer.err.endswith("run: is interrupted, not finished; lora resume finishes a run\n")


def test_a_run_is_made_again_from_its_folder_alone(run, call) -> None:
    answer = call("rerun", "run=run", "hydra.run.dir=again")
    assert answer.code == 0, answer.err
    assert contents(Path("again")) == contents(run)
    assert "equal to the last bit at every step" in answer.out
    assert "adapter    equal, byte by byte" in answer.out
    assert "versions   equal" in answer.out
    assert "again" in answer.out.splitlines()[-1]


@pytest.mark.slow
def test_what_differs_from_the_first_run_is_told(run, call) -> None:
    rows = read_jsonl(run / "metrics.jsonl")
    rows[-1]["validation/accuracy"] = 2.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    change(run, metrics={"validation": {"accuracy": 2.0}}, versions={"torch": "1.13"})
    answer = call("rerun", "run=run", "hydra.run.dir=again")
    assert answer.code == 0, answer.err
    assert "step 6: validation/accuracy 2 recorded" in answer.out
    assert "torch 1.13, now" in answer.out
    assert "differs" in answer.out


@pytest.mark.slow
def test_a_prolonged_run_is_checked_and_made_again_with_its_prolongation(run, call) -> None:
    assert call("resume", "run=run", "train.max_steps=10").code == 0
    answer = call("verify", "run=run", "verify.steps=8")
    assert answer.code == 0, answer.out + answer.err
    assert table(answer.out)["losses"][1].startswith("steps 1 to 6 again")
    answer = call("verify", "run=run", "verify.start=checkpoint")
    assert answer.code == 0, answer.out + answer.err
    assert table(answer.out)["losses"][1].startswith("steps 9 to 10 again")
    answer = call("rerun", "run=run", "hydra.run.dir=again")
    assert answer.code == 0, answer.err
    assert contents(Path("again")) == contents(run)
    assert facts(Path("again"))["extended"] == facts(run)["extended"]
