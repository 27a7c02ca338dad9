"""What a tracker is told of a run, by a stand-in for its package that writes everything down."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from lora_cli.config import to_plain
from lora_cli.spec import ClassificationSpec, LoraSpec, TrackerSpec, TrainRun
from lora_cli.trackers import open_tracker

RUN = TrainRun(task=ClassificationSpec(name="films"), lora=LoraSpec(rank_pattern={"re:.*query": 4}), seed=3)


@pytest.fixture
def told(monkeypatch) -> list[tuple[str, tuple, dict]]:
    """Calls of the stand-ins for mlflow and wandb: name, arguments, keywords."""
    calls: list[tuple[str, tuple, dict]] = []
    for name, functions in (
        ("mlflow", ("set_experiment", "start_run", "log_params", "log_dict", "end_run")),
        ("wandb", ("init",)),
    ):
        module = ModuleType(name)
        for function in functions:
            setattr(module, function, lambda *given, _name=function, **named: calls.append((_name, given, named)))
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_mlflow_gets_every_key_in_batches_that_its_server_takes(told, tmp_path: Path) -> None:
    config = to_plain(RUN) | {"long": "x" * 9000, "many": {str(number): number for number in range(250)}}
    open_tracker(TrackerSpec(name="mlflow"), tmp_path / "films", config).close()
    batches = [given[0] for name, given, _ in told if name == "log_params"]
    assert all(len(batch) <= 100 for batch in batches)
    params = {key: value for batch in batches for key, value in batch.items()}
    assert sum(map(len, batches)) == len(params)
    expected = {
        "seed": "3",
        "lora.r": "8",
        "lora.rank_pattern.re_._query": "4",
        "task.name": "films",
        "many.249": "249",
    }
    assert params.items() >= expected.items()
    assert max(map(len, params.values())) <= 500


@pytest.mark.parametrize(("folder", "name"), [("films", "films"), ("sweep_r_1a2b/7", "sweep_r_1a2b/7")])
def test_a_job_of_a_sweep_is_named_after_the_sweep(folder: str, name: str, told, tmp_path: Path) -> None:
    open_tracker(TrackerSpec(name="mlflow"), tmp_path / folder, to_plain(RUN))
    open_tracker(TrackerSpec(name="wandb"), tmp_path / folder, to_plain(RUN))
    assert [named["run_name"] for call, _, named in told if call == "start_run"] == [name]
    assert [named["name"] for call, _, named in told if call == "init"] == [name]
