"""The splits of a task: files, a set shipped in the package, a mirror, the hub. Knows DataSpec, not the task's kind."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_cli import hub
from lora_cli.errors import ConfigError, DataError, UnknownName, printable
from lora_cli.spec import SPLITS, DataSpec
from lora_cli.tasks.files import shown
from lora_cli.tasks.rows import Rows, read_file, unknown

__all__ = ["load_splits"]

_EMBEDDED = Path(__file__).parent / "data"
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-(?P<count>\d{5})\.parquet")
_NO_GOLD_LABEL = -1
"""What data sets on the hub write where a label is hidden, or annotators did not agree."""


def load_splits(
    data: DataSpec, needed: Sequence[str], *, label: str | None, regression: bool, seed: int
) -> dict[str, Rows]:
    """The `needed` splits, by our names, cut to their limits.

    A file given for a split stands for it; with a training file, nothing else of a data set is used. A set without a
    validation split lends `validation_share` of its training rows, drawn by `seed` with the shares of the values of
    column `label` kept (at random for `regression`, or without a label); the same call always draws the same rows.
    Training rows beyond `train_limit` are left out in the same manner, other splits are cut after their first rows.

    Raises:
        ConfigError: no source is given, or no such embedded set.
        DataError: a split or a file is missing or broken.
        UserError: the data set is not on this machine, and there is no network.
    """
    source = _Source(data, label)
    stratum = None if regression else label
    splits: dict[str, Rows] = {}
    for split in needed:
        if split in ("train", "validation") and not source.has("validation"):
            rows = _held_out(source.load("train"), data.validation_share, stratum, seed)[split]
        else:
            rows = source.load(split)
        splits[split] = _limited(rows, split, data, stratum, seed)
    return splits


class _Source:
    """Where each split lies; loads one at a time, and only once."""

    def __init__(self, data: DataSpec, label: str | None) -> None:
        self._data, self._label = data, label
        self._files = {split: path for split in SPLITS if (path := getattr(data, split)) is not None}
        self._hub: dict[str, Any] = {}
        self._set: dict[str, list[Path]] = {}
        self._loaded: dict[str, Rows] = {}
        if "train" not in self._files:
            self._find_set()

    def has(self, split: str) -> bool:
        return split in self._files or self._theirs(split) in {*self._set, *self._hub}

    def load(self, split: str) -> Rows:
        if split not in self._loaded:
            self._loaded[split] = self._load(split)
        return self._loaded[split]

    def _load(self, split: str) -> Rows:
        if split in self._files:
            return read_file(self._files[split])
        theirs = self._theirs(split)
        if theirs in self._set:
            return self._with_labels(_concatenated(self._set[theirs]))
        if theirs in self._hub:
            name = f"{self._data.hub} {self._data.config} {theirs}"
            return self._with_labels(Rows(self._hub[theirs].to_list(), source=name))
        raise self._missing(split)

    def _find_set(self) -> None:
        data = self._data
        if data.embedded is not None:
            self._set = _embedded(data.embedded)
        elif data.hub is not None:
            folder = hub.mirror_dataset(data.hub, data.config)
            if folder is not None:
                self._set = _shards(folder)
            else:
                self._hub = _from_hub(data)
        elif not self._files:
            raise ConfigError("task.data.train", None, "give files (task.data.train=FILE), or a data set of the hub")

    def _theirs(self, split: str) -> str:
        return self._data.splits.get(split, split)

    def _missing(self, split: str) -> DataError:
        only_files = not (self._set or self._hub)
        where = self._data.embedded or f"{self._data.hub} ({self._data.config})"
        if only_files:
            where = ", ".join(map(shown, self._files.values()))
        if only_files and split in SPLITS:
            return DataError(where, f"no {split} rows are given: task.data.{split}=FILE is missing")
        return unknown(where, "split", self._theirs(split), {**self._files, **self._set, **self._hub})

    def _with_labels(self, rows: Rows) -> Rows:
        if self._label is None or self._data.hub is None:
            return rows
        kept = [index for index, row in enumerate(rows) if not _is_unlabelled(row.get(self._label))]
        if not kept:
            raise DataError(rows.source, f"every '{self._label}' is -1: the data set hides the labels of this split")
        if len(kept) == len(rows):
            return rows
        labelled = rows.select(kept)
        labelled.num_unlabelled = len(rows) - len(kept)
        return labelled


def _is_unlabelled(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == _NO_GOLD_LABEL


def _embedded(name: str) -> dict[str, list[Path]]:
    names = [folder.name for folder in _EMBEDDED.iterdir() if folder.is_dir()] if _EMBEDDED.is_dir() else []
    if name not in names:
        raise UnknownName("task.data.embedded", name, names, "data set in this package")
    return {path.stem: [path] for path in sorted((_EMBEDDED / name).glob("*.csv"))}


def _shards(folder: Path) -> dict[str, list[Path]]:
    shards: defaultdict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.glob("*.parquet")):
        match = _SHARD.fullmatch(path.name)
        if match:
            shards[match["split"]].append(path)
    for split, paths in shards.items():
        count = int(paths[0].stem.rsplit("-", 1)[-1])
        if len(paths) != count:
            raise DataError(
                shown(folder), f"{len(paths)} of the {count} files of split '{printable(split, 40)}' are there"
            )
    return dict(shards)


def _concatenated(paths: Sequence[Path]) -> Rows:
    parts = [read_file(path) for path in paths]
    if len(parts) == 1:
        return parts[0]
    return Rows([row for part in parts for row in part], source=shown(paths[0].parent / paths[0].name.split("-")[0]))


def _from_hub(data: DataSpec) -> dict[str, Any]:
    """The data set from the cache of `datasets`, else from the hub. Code that comes with it is never run."""
    import datasets

    assert data.hub is not None
    hub.check_hub_id(data.hub)
    # It warns that the hub could not be reached, which is what the next lines want.
    datasets.utils.logging.set_verbosity_error()
    try:
        with hub.offline():
            cached = datasets.load_dataset_builder(data.hub, data.config)
        # The cache cannot tell which commit a branch or tag stood for, so only a commit is taken from it.
        if data.revision in (None, cached.hash):
            return dict(cached.as_dataset())
    except (OSError, ValueError):
        pass
    what = f"data set {data.hub} ({data.config})"
    hub.require_network(what, "fetch it where there is a network (lora fetch task=NAME), or set LORA_HUB_ROOT")
    try:
        return dict(datasets.load_dataset(data.hub, data.config, revision=data.revision))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(what, f"cannot be loaded from the hub: {printable(error, 160)}") from error


def _held_out(train: Rows, share: float, label: str | None, seed: int) -> dict[str, Rows]:
    strata = _strata(train, label, random.Random(f"{seed} validation"))
    # The first row of each value stays in training, so that no label is met in validation only.
    candidates = [index for stratum in strata for index in stratum[1:]]
    count = min(max(1, round(share * len(train))), len(candidates))
    if not count:
        why = "too few rows" if label is None else f"no value of '{printable(label, 40)}' occurs twice"
        hint = "" if label is None else ", or for numbers to predict, set task.regression=true"
        raise DataError(
            train.source, f"{why}, so none can be held out for validation; give task.data.validation=FILE{hint}"
        )
    drawn = set(_spread(candidates, count))
    return {
        "train": train.select(index for index in range(len(train)) if index not in drawn),
        "validation": train.select(sorted(drawn)),
    }


def _limited(rows: Rows, split: str, data: DataSpec, label: str | None, seed: int) -> Rows:
    # validation_mismatched and its like are cut as the split they are a part of.
    limit: int | None = getattr(data, f"{split.split('_')[0]}_limit", None)
    if limit is None or limit >= len(rows):
        return rows
    if split != "train":
        return rows.select(range(limit))
    strata = _strata(rows, label, random.Random(f"{seed} train_limit"))
    return rows.select(sorted(_spread([index for stratum in strata for index in stratum], limit)))


def _strata(rows: Rows, label: str | None, generator: random.Random) -> list[list[int]]:
    """Row numbers by value of column `label` (all together without one), each group in random order."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[str(row.get(label)) if label else ""].append(index)
    strata = [groups[value] for value in sorted(groups)]
    for stratum in strata:
        generator.shuffle(stratum)
    return strata


def _spread(items: Sequence[int], count: int) -> list[int]:
    """`count` items at equal distances: of groups that stand one after the other, each gives its share."""
    return [items[(2 * number + 1) * len(items) // (2 * count)] for number in range(count)]
