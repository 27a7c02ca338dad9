"""What a list says of runs that could not note their own end."""

from __future__ import annotations

from pathlib import Path

from lora_cli.config import to_plain
from lora_cli.runs.directory import RunDirectory
from lora_cli.runs.summary import summary
from lora_cli.runs.sweep import SweepJob, record
from lora_cli.spec import ClassificationSpec, TrainRun


def test_a_run_that_nobody_trains_any_more_is_not_running(scratch: Path) -> None:
    run = RunDirectory.create(to_plain(TrainRun(task=ClassificationSpec())), directory=Path("killed"), overrides=[])
    with run.held():
        assert summary(run).status == "running"
    assert run.facts()["status"] == "running", "so it was when it was killed"
    assert summary(run).status == "interrupted"


def test_a_run_that_a_search_stopped_is_pruned(scratch: Path) -> None:
    run = RunDirectory.create(to_plain(TrainRun(task=ClassificationSpec())), directory=Path("search/3"), overrides=[])
    run.update(status="interrupted")
    assert summary(run).status == "interrupted"
    record(Path("search"), SweepJob(3, ("lora.r=2",), "search/3", status="pruned"))
    assert summary(run).status == "pruned"
