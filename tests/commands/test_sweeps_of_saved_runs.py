"""lora eval and infer with -m, with a folder of one's own, and on a bare adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from commands.conftest import Finished


@pytest.fixture
def copy(finished: Finished, films: Path) -> Path:
    """A copy of the run in the current directory."""
    return shutil.copytree(finished.path, films / "copy")


def test_two_jobs_of_a_sweep_do_not_write_the_same_output(copy: Path, call) -> None:
    answer = call("eval", "run=copy", "-m", "task.split=validation,test", "output=out")
    assert answer.code == 1
    assert "output=out: an earlier job of this sweep has written there" in answer.err
    assert len(Path("out/predictions.jsonl").read_text().splitlines()) == 30


def test_a_sweep_of_infer_leaves_no_folder(copy: Path, call) -> None:
    answer = call("infer", "run=copy", "-m", "batch_size=1,2", "text=aa")
    assert answer.code == 0, answer.err
    assert len(answer.out.splitlines()) == 2
    assert not Path("runs").exists()


@pytest.mark.parametrize("words", [["infer", "run=copy", "text=a"], ["fetch", "model=minilm"]], ids=lambda w: w[0])
def test_a_folder_for_a_run_is_refused_where_none_is_made(words: list[str], copy: Path, refused) -> None:
    assert f"hydra.run.dir=x: lora {words[0]} makes no folder of a run" in refused(*words, "hydra.run.dir=x")
    assert not Path("x").exists()


def test_a_bare_adapter_needs_no_model_name_beside_a_path(copy: Path, refused) -> None:
    words = ["run=copy/adapter", "task=text_classification", "task.label=verdict"]
    assert "give model=NAME or model.path=FOLDER" in refused("eval", *words)
    Path("base").mkdir()
    assert "base/config.json" in refused("eval", *words, "model.path=base", "task.data.validation=validation.csv")
