"""The adapters that can be asked for, by name: a table made of folders at start. Knows runs and tasks; loads no weight.

A client names an adapter by a key of this table, and never by a path.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_cli.config import read_train_run
from lora_cli.errors import ConfigError, RunError, UserError, listed
from lora_cli.nn import AdapterFile, read_adapter
from lora_cli.runs.directory import RunDirectory, read_saved_config
from lora_cli.runs.manifest import check_model_files
from lora_cli.runs.registry import find_adapter, find_run, is_bare_adapter
from lora_cli.saved import task_of, with_tokens
from lora_cli.spec import ModelSpec, TaskSpec
from lora_cli.tasks import Classification, Task

__all__ = ["Entry", "Shelf", "Stamp"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)

Stamp = tuple[tuple[int, int, int], ...]
"""Of each file of an adapter: inode, size and time of its last change."""


@dataclass(frozen=True)
class Entry:
    """One adapter, read but for its weights."""

    name: str
    path: Path
    """The run, or the folder of the adapter alone."""
    file: AdapterFile
    task: Task
    model: ModelSpec
    """The base model that it was trained on."""
    seed: int
    """What new layers of the base were drawn with."""
    packing: bool
    """Whether it was trained without padding."""
    tokenizer: Path | None
    """Its own tokenizer; None: the base's."""
    stamp: Stamp

    @property
    def writes(self) -> bool:
        """Whether it answers with text."""
        return not isinstance(self.task, Classification)


class Shelf:
    """The folders named at start, and what is in them.

    `model` goes before what runs say of their base; `task` is that of adapters without a run.

    Raises:
        UserError: nothing is there, two have one name, or a run cannot be read.
    """

    def __init__(self, runs: Sequence[str], *, task: TaskSpec | None = None, model: ModelSpec | None = None) -> None:
        self._task, self._model = task, model
        self._places: list[Path] = []
        """Runs and adapters named one by one, and folders of them."""
        for name in runs:
            path = Path(name)
            self._places.append(path if path.is_dir() and not _is_one(path) else find_run(name))
        self._paths = self._found(strict=True)
        self.entries = self._read_all()
        if not self.entries:
            raise RunError(f"run={','.join(runs)}: no finished run and no adapter is in there")

    def _read_all(self) -> dict[str, Entry]:
        entries, errors = dict[str, Entry](), dict[str, UserError]()
        for name in self._paths:
            try:
                entries[name] = self.read(name)
            except UserError as error:
                errors[name] = error
        if len(errors) > 1:
            raise RunError(f"{listed(list(errors))} cannot be used; the first: {next(iter(errors.values()))}")
        if errors:
            raise next(iter(errors.values()))
        return entries

    def look_again(self) -> list[str]:
        """The names of all adapters in the folders as they are now."""
        self._paths = self._found()
        return list(self._paths)

    def read(self, name: str) -> Entry:
        """The adapter called `name` as it is on disk now.

        Raises:
            UserError: it is not there any more, or cannot be read.
        """
        path = self._paths.get(name)
        # What is named at start may be a link; what is found in a folder may not have become one since.
        if path is None or not path.is_dir() or (path.is_symlink() and path not in self._places):
            raise RunError(f"{path or name}: the folder is gone")
        folder = None if is_bare_adapter(path) else RunDirectory(path)
        if folder is not None:
            folder.check_plain()
        facts = {} if folder is None else folder.facts()
        # A run that goes on saves another adapter before its manifest says so.
        if folder is not None and facts["status"] == "finished":
            check_model_files(path)
        where = find_adapter(str(path))
        # Before anything is read: what changes meanwhile is seen as a change later.
        stamp = _stamp_of(where)
        file = read_adapter(where)
        run = read_train_run(read_saved_config(path)) if folder is not None else None
        task, model = (run.task, run.model) if run else (self._task, self._model)
        if task is None or model is None:
            missing = "task" if task is None else "model"
            raise ConfigError(missing, "", f"{name} is a bare adapter, which does not say which; give {missing}=NAME")
        own = None if folder is None else folder.tokenizer
        return Entry(
            name=name,
            path=path,
            file=file,
            task=task_of(task, facts.get("labels") or file.extra.get("labels"), path),
            model=with_tokens(self._model or model, file.extra.get("tokens"), path),
            seed=int(facts.get("init_seed", 0)),
            packing=bool(facts.get("packing", True)),
            tokenizer=own if own is not None and own.is_dir() else None,
            stamp=stamp,
        )

    def has_changed(self, entry: Entry) -> bool:
        """Whether another adapter lies where `entry` was read."""
        return self.stamp_of(entry) != entry.stamp

    def stamp_of(self, entry: Entry) -> Stamp:
        """That of the adapter which lies where `entry` was read."""
        try:
            return _stamp_of(entry.file.folder)
        except OSError:
            return entry.stamp  # It is just being replaced, or gone: what is in memory still answers.

    def _found(self, *, strict: bool = False) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in (path for place in self._places for path in _in(place)):
            if found.setdefault(path.name, path) != path and strict:
                raise ConfigError("run", path, f"another adapter is called {path.name}: {found[path.name]}")
            if strict and not _NAME.fullmatch(path.name):
                raise ConfigError("run", path, "an adapter's name has letters, digits, dots, dashes and underscores")
        return {name: path for name, path in found.items() if _NAME.fullmatch(name)}


def _stamp_of(folder: Path) -> Stamp:
    """What changes when an adapter is replaced, or written anew."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors"))
    return tuple((found.st_ino, found.st_size, found.st_mtime_ns) for found in (file.lstat() for file in files))


def _is_one(path: Path) -> bool:
    try:
        return find_run(str(path)) == path
    except UserError:
        return False


def _in(place: Path) -> Iterator[Path]:
    """The adapter that `place` is, or those that are in it. Links (runs/latest) lead to what has a name already."""
    if _is_one(place):
        yield place
    elif place.is_dir():
        for path in sorted(place.iterdir()):
            if not path.is_symlink() and path.is_dir() and _is_one(path) and _has_adapter(path):
                yield path


def _has_adapter(path: Path) -> bool:
    return is_bare_adapter(path) or RunDirectory(path).adapter.is_dir()
