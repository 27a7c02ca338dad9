"""Where splits come from, what is held out, what is drawn."""

from __future__ import annotations

import collections
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.errors import ConfigError, DataError, UnknownName, UserError
from lora_cli.spec import DataSpec
from lora_cli.tasks import splits as module
from lora_cli.tasks.rows import Rows
from lora_cli.tasks.splits import load_splits

REAL_MIRROR = os.environ.get("LORA_HUB_ROOT")


def csv_file(path: Path, labels: list[str]) -> str:
    path.write_text("text,label\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(labels)))
    return str(path)


def load(data: DataSpec, *needed: str, seed: int = 0, regression: bool = False) -> dict[str, Rows]:
    return load_splits(data, needed, label="label", regression=regression, seed=seed)


def texts(rows: Rows) -> list[str]:
    return [row["text"] for row in rows]


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mirror of one data set: train in two files, validation_matched, and a test split without labels."""
    folder = tmp_path / "mirror" / "datasets" / "owner" / "set" / "cfg"
    folder.mkdir(parents=True)
    for name, labels in {
        "train-00000-of-00002": [0, 1, -1],
        "train-00001-of-00002": [1],
        "validation_matched-00000-of-00001": [0, 1],
        "test-00000-of-00001": [-1, -1],
    }.items():
        table = pa.table({"text": [f"{name} {i}" for i in range(len(labels))], "label": labels})
        pq.write_table(table, folder / f"{name}.parquet")
    monkeypatch.setenv("LORA_HUB_ROOT", str(tmp_path / "mirror"))
    return folder


MIRRORED = {"hub": "owner/set", "config": "cfg"}


def test_a_mirror_is_read_with_all_its_files(mirror: Path) -> None:
    data = DataSpec(**MIRRORED, splits={"validation": "validation_matched"})
    loaded = load(data, "train", "validation", "validation_matched")
    assert texts(loaded["train"]) == [
        "train-00000-of-00002 0", "train-00000-of-00002 1", "train-00001-of-00002 0",
    ]  # fmt: skip
    assert texts(loaded["validation"]) == texts(loaded["validation_matched"])


def test_rows_without_gold_label_are_left_out_and_counted(mirror: Path) -> None:
    assert load(DataSpec(**MIRRORED, splits={"validation": "validation_matched"}), "train")["train"].num_unlabelled == 1
    with pytest.raises(DataError, match="hides the labels"):
        load(DataSpec(**MIRRORED), "test")


def test_hidden_labels_do_not_matter_where_none_are_needed(mirror: Path) -> None:
    splits = load_splits(DataSpec(**MIRRORED), ["test"], label=None, regression=False, seed=0)
    assert len(splits["test"]) == 2


def test_a_missing_split_names_those_present(mirror: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'dev'.* There are: .*train, validation_matched"):
        load(DataSpec(**MIRRORED, splits={"validation": "validation_matched"}), "dev")


def test_a_mirror_with_a_file_missing_is_refused(mirror: Path) -> None:
    (mirror / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="1 of the 2 files of split 'train'"):
        load(DataSpec(**MIRRORED), "train")


def test_a_file_stands_for_its_split_and_a_training_file_for_the_whole_set(mirror: Path, tmp_path: Path) -> None:
    own = csv_file(tmp_path / "own.csv", ["0", "1"] * 10)
    data = DataSpec(**MIRRORED, validation=own)
    assert len(load(data, "train", "validation")["train"]) == 3
    with pytest.raises(DataError, match=r"no test rows are given: task\.data\.test=FILE"):
        load(DataSpec(**MIRRORED, train=own), "test")
    assert len(load(DataSpec(**MIRRORED, train=own), "train", "validation")["validation"]) == 2


def test_only_a_validation_file_has_no_training_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no train rows are given"):
        load(DataSpec(validation=csv_file(tmp_path / "v.csv", ["a", "b"])), "train")


def test_no_source_is_an_error_in_the_config() -> None:
    with pytest.raises(ConfigError, match=r"task\.data\.train"):
        load(DataSpec(), "train")


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    for split in ("train", "validation"):
        csv_file(tmp_path / "mine" / f"{split}.csv", ["a", "b"])
    monkeypatch.setattr(module, "_EMBEDDED", tmp_path)


@pytest.mark.usefixtures("embedded")
def test_an_embedded_set_is_read() -> None:
    assert len(load(DataSpec(embedded="mine"), "train", "validation")["validation"]) == 2
    with pytest.raises(UnknownName, match="Did you mean mine"):
        load(DataSpec(embedded="mines"), "train")
    with pytest.raises(UnknownName):
        load(DataSpec(embedded="../mine"), "train")


def test_held_out_rows_are_in_neither_or_both_calls_and_never_in_training(tmp_path: Path) -> None:
    data = DataSpec(train=csv_file(tmp_path / "t.csv", ["a"] * 40 + ["b"] * 20), validation_share=0.2)
    both = load(data, "train", "validation")
    assert texts(load(data, "validation")["validation"]) == texts(both["validation"])
    assert texts(load(data, "train")["train"]) == texts(both["train"])
    assert sorted(texts(both["train"]) + texts(both["validation"])) == sorted(f"text {i}" for i in range(60))
    assert texts(load(data, "validation", seed=1)["validation"]) != texts(both["validation"])


@settings(max_examples=40, deadline=None)
@given(
    counts=st.dictionaries(st.sampled_from("abcde"), st.integers(1, 30), min_size=1).filter(
        lambda counts: max(counts.values()) > 1
    ),
    share=st.floats(0.05, 0.5),
    seed=st.integers(0, 99),
)
def test_held_out_rows_keep_the_labels_shares(tmp_path_factory, counts, share, seed) -> None:
    labels = [label for label, count in counts.items() for _ in range(count)]
    data = DataSpec(train=csv_file(tmp_path_factory.mktemp("s") / "t.csv", labels), validation_share=share)
    loaded = load(data, "train", "validation", seed=seed)
    held = collections.Counter(row["label"] for row in loaded["validation"])
    candidates = len(labels) - len(counts)
    assert len(loaded["validation"]) == min(max(1, round(share * len(labels))), candidates)
    for label, count in counts.items():
        assert held[label] < count
        assert abs(held[label] - (count - 1) * len(loaded["validation"]) / candidates) <= 1


def test_too_few_rows_to_hold_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"give task\.data\.validation"):
        load(DataSpec(train=csv_file(tmp_path / "t.csv", ["a", "b"])), "validation")


def test_regression_rows_are_held_out_at_random(tmp_path: Path) -> None:
    data = DataSpec(train=csv_file(tmp_path / "t.csv", [str(i / 7) for i in range(50)]))
    assert len(load(data, "validation", regression=True)["validation"]) == 5


def test_limits_draw_training_rows_and_cut_the_others(tmp_path: Path) -> None:
    path = csv_file(tmp_path / "t.csv", ["a"] * 30 + ["b"] * 10)
    data = DataSpec(train=path, validation=path, test=path, train_limit=8, validation_limit=3, test_limit=99)
    loaded = load(data, "train", "validation", "test")
    assert collections.Counter(row["label"] for row in loaded["train"]) == {"a": 6, "b": 2}
    numbers = [int(text.split()[1]) for text in texts(loaded["train"])]
    assert numbers == sorted(set(numbers))
    assert texts(loaded["validation"]) == ["text 0", "text 1", "text 2"]
    assert len(loaded["test"]) == 40
    assert texts(load(data, "train")["train"]) == texts(loaded["train"])
    assert texts(load(data, "train", seed=1)["train"]) != texts(loaded["train"])


def test_the_limit_of_validation_holds_for_its_parts(mirror: Path) -> None:
    assert len(load(DataSpec(**MIRRORED, validation_limit=1), "validation_matched")["validation_matched"]) == 1


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A cache such as datasets leaves after owner/cached, config cfg, was loaded once; and no network. → commit."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    commit = "a" * 40
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.delenv("LORA_HUB_ROOT", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, 1]}), tmp_path / "x.parquet")
    datasets.disable_progress_bars()
    Parquet(
        cache_dir=str(cache),
        dataset_name="cached",
        config_name="cfg",
        version="0.0.0",
        hash=commit,
        data_files={"train": [str(tmp_path / "x.parquet")]},
    ).download_and_prepare()
    (cached,) = cache.glob("cached/cfg*")
    (cache / "owner___cached").mkdir()
    cached.rename(cache / "owner___cached" / "cfg")
    return commit


def test_the_cache_of_datasets_is_used_before_the_network(hub_cache: str) -> None:
    rows = load(DataSpec(hub="owner/cached", config="cfg", validation="given"), "train")["train"]
    assert texts(rows) == ["a", "b"]
    assert rows.where(1) == "owner/cached cfg train row 2"
    pinned = DataSpec(hub="owner/cached", config="cfg", revision=hub_cache, validation="given")
    assert len(load(pinned, "train")["train"]) == 2


def test_another_revision_than_the_cached_one_is_not_taken_for_it(hub_cache: str) -> None:
    with pytest.raises(UserError, match=r"owner/cached \(cfg\).*lora fetch"):
        load(DataSpec(hub="owner/cached", config="cfg", revision="b" * 40), "train")


@pytest.mark.usefixtures("hub_cache")
def test_a_set_that_is_not_here_is_refused_without_a_network() -> None:
    with pytest.raises(UserError, match="lora fetch"):
        load(DataSpec(hub="owner/other", config="cfg"), "train")


@pytest.mark.mirror
@pytest.mark.skipif(REAL_MIRROR is None, reason="LORA_HUB_ROOT is not set")
def test_the_real_mirror_holds_rte() -> None:
    loaded = load(DataSpec(hub="nyu-mll/glue", config="rte"), "train", "validation")
    assert [len(rows) for rows in loaded.values()] == [2490, 277]
