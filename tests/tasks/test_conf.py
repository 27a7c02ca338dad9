"""Every task file that ships: its keys, its data, its labels."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_cli.spec import TASK_KINDS, ClassificationSpec, DataSpec, DecodeSpec, TaskSpec
from lora_cli.tasks import build_task, load_splits

FILES = sorted((Path(__file__).parents[2] / "conf" / "task").glob("*.yaml"))
OWN_DATA = {"text_classification", "text_regression", "text_generation", "chat", "language_modeling"}
MIRROR = os.environ.get("LORA_HUB_ROOT")
MIRRORED = {
    "sst2": "validation", "cola": "validation", "mrpc": "validation", "qqp": "validation", "stsb": "validation",
    "mnli": "validation", "qnli": "validation", "rte": "validation", "wnli": "validation", "boolq": "validation",
    "cb": "validation", "copa": "validation", "snli": "validation",
}  # fmt: skip


def kind_and_values(path: Path) -> tuple[type[TaskSpec], dict[str, Any]]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    schema, own = content.pop("defaults")
    assert own == "_self_"
    return TASK_KINDS[schema.removeprefix("/schema/task/").removesuffix("@_here_")], content


def spec_of(path: Path) -> TaskSpec:
    kind, content = kind_and_values(path)
    nested = {"data": DataSpec, "decode": DecodeSpec}
    return kind(**content | {key: nested[key](**content[key]) for key in nested if key in content})


def differs(default: object, value: object) -> bool:
    if dataclasses.is_dataclass(default):
        return all(differs(getattr(default, key), inner) for key, inner in value.items())
    return default != value


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_task_file_is_a_valid_task_named_like_itself(path: Path) -> None:
    spec = spec_of(path)
    assert spec.name == path.stem
    assert build_task(spec).primary_metric == (spec.metrics[0] if isinstance(spec, ClassificationSpec) else "loss")
    assert (spec.data.hub is None and spec.data.embedded is None) == (path.stem in OWN_DATA)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_task_file_says_only_what_differs_from_the_defaults(path: Path) -> None:
    kind, content = kind_and_values(path)
    assert all(differs(getattr(kind(), key), value) for key, value in content.items())


@pytest.mark.mirror
@pytest.mark.skipif(MIRROR is None, reason="LORA_HUB_ROOT is not set")
@pytest.mark.parametrize("path", [path for path in FILES if path.stem in MIRRORED], ids=lambda path: path.stem)
def test_a_task_fits_its_data(path: Path) -> None:
    task = build_task(spec_of(path))
    data = dataclasses.replace(task.spec.data, validation_limit=400)
    splits = load_splits(data, ["validation"], label="label", regression=task.spec.regression, seed=0)
    task.fit_labels(splits["validation"])
    assert set(task.columns) <= set(splits["validation"].columns)
    labels = {row["label"] for row in splits["validation"]}
    assert task.labels is None or labels == set(range(len(task.labels)))


def test_the_shipped_data_set_has_every_intent_in_every_split() -> None:
    spec = spec_of(next(path for path in FILES if path.stem == "support_intents"))
    splits = load_splits(spec.data, ["train", "validation", "test"], label="label", regression=False, seed=0)
    for rows in splits.values():
        assert {row["label"] for row in rows} == set(spec.labels or ())
