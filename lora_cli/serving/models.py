"""Saved runs as Python objects: `load` one, `load_many` on one base. They answer as the server does."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

from lora_cli.engine.device import open_device
from lora_cli.errors import ConfigError, UnknownName
from lora_cli.serving.adapters import Entry, Shelf
from lora_cli.serving.jobs import Job, LabelJob, Piece, WriteJob
from lora_cli.serving.pool import Pool
from lora_cli.serving.scheduler import work_of
from lora_cli.spec import DecodeSpec, DeviceSpec, ModelSpec, TaskSpec
from lora_cli.spec.checks import one_of
from lora_cli.tasks import Classification, TextTask

__all__ = ["Models", "load", "load_many", "row_of"]

_BATCH_TOKENS = 4096
_KINDS: dict[Any, tuple[Any, str]] = {
    bool: (bool, "True or False"),
    int: (int, "a whole number"),
    int | None: (int | None, "a whole number, or None,"),
    float: (float | int, "a number"),
    list[str]: (list, "a list of texts"),
}
"""Type of a field of DecodeSpec → what fits it, in words too."""

Text = str | Mapping[str, str] | Sequence[str]
"""A text; of a task with several columns, its cells by column or in their order."""


def load(run: str | Path, *, device: str = "auto", **settings: Any) -> Models:
    """A saved run, or an adapter, ready to answer: `load("runs/latest").predict(["a fine film"])`.

    `settings` are those of `load_many`.

    Raises:
        UserError: it cannot be used, or there is no such setting.
    """
    for name in settings:
        one_of("load", name, load_many.__annotations__.keys() - {"runs", "return"}, "setting")
    return load_many([run], device=device, **settings)


def load_many(
    runs: Iterable[str | Path],
    *,
    device: str = "auto",
    threads: int | None = None,
    task: TaskSpec | None = None,
    model: ModelSpec | None = None,
    max_adapters: int = 64,
    max_bytes: int | None = None,
    batch_tokens: int = _BATCH_TOKENS,
    force_base: bool = False,
) -> Models:
    """Saved runs and adapters (or folders of them) on one base, which is loaded once; each text is answered by one.

    `task` is that of adapters without a run, `model` goes before the base that runs name; `max_adapters` are in memory
    at most, and take `max_bytes`.

    Raises:
        UserError: one of them cannot be used, or does not fit the base of the first one; it is named. Or a setting has
            a value that it does not take.
    """
    named = _listed("runs", runs, "a list of runs and adapters is needed; load() takes one")
    for run in named:
        if not isinstance(run, str | Path) or not str(run):
            raise ConfigError("run", repr(run), "the name or the folder of a run is needed")
    _check_number("max_adapters", max_adapters)
    _check_number("batch_tokens", batch_tokens)
    for key, number in (("max_bytes", max_bytes), ("threads", threads)):
        if number is not None:
            _check_number(key, number)
    for key, given, kind in (("task", task, TaskSpec), ("model", model, ModelSpec)):
        if not isinstance(given, kind | None):
            raise ConfigError(key, repr(given), f"a {kind.__name__} of lora_cli.spec is needed, or a kind of it")
    shelf = Shelf([str(run) for run in named], task=task, model=model)
    opened = open_device(DeviceSpec(name=device, threads=threads))
    pool = Pool(shelf, opened, max_adapters=max_adapters, max_bytes=max_bytes, force_base=force_base)
    return Models(pool, batch_tokens)


class Models:
    """Adapters on one base. Threads may share it; one of them computes at a time."""

    def __init__(self, pool: Pool, batch_tokens: int = _BATCH_TOKENS) -> None:
        self.pool, self._work, self._turn = pool, work_of(pool, batch_tokens), threading.Lock()

    @property
    def names(self) -> list[str]:
        """The adapters, as `model` takes them."""
        return list(self.pool.entries)

    def predict(self, texts: Iterable[Text], model: str | Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The answer to each text, as `lora infer` gives it: label and probabilities, or a value, or a written text.

        `model` names the adapter, or one for each text; None: the first.

        Raises:
            UserError: a name is unknown, or a text cannot be read.
        """
        texts = _listed("texts", texts, 'a list of texts is needed, for one too: ["a text"]')
        if self.pool.writes:
            return [{"prediction": text} for text in self.generate(texts, model)]
        jobs: list[Job] = []
        found: list[Any] = []
        for name, text in zip(self._names(model, len(texts)), texts, strict=True):
            rows = [row_of(self._entry(name), text)]
            jobs.append(LabelJob(name=name, rows=rows, tell=_into(found, len(jobs))))
        return [answers[0] for answers in self._done(jobs, found)]

    def generate(
        self,
        texts: Iterable[Text],
        model: str | Sequence[str] | None = None,
        *,
        seed: int = 0,
        **decode: Any,
    ) -> list[str]:
        """The text that each adapter writes after each prompt. `decode` are keys of task.decode, by default the run's
        own; the k-th text is drawn by `seed` + k.

        Raises:
            UserError: a name or a key is unknown, or a prompt cannot be read.
        """
        if not self.pool.writes:
            raise ConfigError("generate", "", "these adapters write no text; use predict")
        texts = _listed("texts", texts, 'a list of texts is needed, for one too: ["a text"]')
        jobs: list[Job] = []
        found: list[Any] = []
        for number, (name, text) in enumerate(zip(self._names(model, len(texts)), texts, strict=True)):
            entry = self._entry(name)
            settings = _decode(entry, decode)
            row = row_of(entry, text)
            jobs.append(WriteJob(name=name, row=row, decode=settings, seed=seed + number, tell=_into(found, number)))
        pieces: list[Piece] = self._done(jobs, found)
        return [piece.text for piece in pieces]

    def _done(self, jobs: Sequence[Job], found: list[Any]) -> list[Any]:
        waiting = deque(jobs)
        found.extend(itertools.repeat(None, len(jobs)))
        with self._turn:
            while waiting or not self._work.is_idle:
                self._work.begin(waiting)
                if not self._work.is_idle:
                    self._work.step()
        for each in found:
            if isinstance(each, Exception):
                raise each
        return found

    def _entry(self, name: str) -> Entry:
        if name not in self.pool.entries:
            raise UnknownName("model", name, self.pool.entries, "adapter")
        return self.pool.entries[name]

    def _names(self, model: str | Sequence[str] | None, number: int) -> list[str]:
        if model is None or isinstance(model, str):
            return [model or self.names[0]] * number
        names = _listed("model", model, "an adapter's name is needed, or one for each text")
        if len(names) != number:
            raise ConfigError("model", names, f"one name for each of the {number} texts")
        return names


def row_of(entry: Entry, text: Text) -> dict[str, Any]:
    """The row that is meant by a text for this adapter.

    Raises:
        UserError: its task wants other columns.
    """
    columns = entry.task.columns
    if isinstance(text, Mapping):
        return dict(text)
    if not isinstance(text, str):
        if not isinstance(text, Sequence) or isinstance(text, bytes):
            raise ConfigError("input", repr(text), "a text is needed, or one for each of the columns")
        if len(text) != len(columns):
            raise ConfigError("input", "", f"this adapter reads {len(columns)} texts: {', '.join(columns)}")
        return dict(zip(columns, text, strict=True))
    if isinstance(entry.task, Classification) and len(columns) > 1:
        raise ConfigError("input", "", f"this adapter reads several texts: {', '.join(columns)}")
    return {columns[0]: text} if isinstance(entry.task, Classification) else entry.task.row_of(text)


def _decode(entry: Entry, changes: Mapping[str, Any]) -> DecodeSpec:
    assert isinstance(entry.task, TextTask)
    kinds = get_type_hints(DecodeSpec)
    for name, value in changes.items():
        one_of("generate", name, kinds, "setting")
        kind, words = _KINDS[kinds[name]]
        if not isinstance(value, kind) or (kind is list and not all(isinstance(each, str) for each in value)):
            raise ConfigError(name, repr(value), f"{words} is needed")
    return replace(entry.task.spec.decode, **changes)


def _check_number(key: str, number: int) -> None:
    if not isinstance(number, int) or number < 1:
        raise ConfigError(key, repr(number), "a whole number is needed, 1 or more")


def _listed(key: str, given: Any, needed: str) -> list[Any]:
    """What is given as a list; one text is none, though Python takes its characters for one."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise ConfigError(key, repr(given), needed)
    return list(given)


def _into(found: list[Any], place: int) -> Any:
    def tell(event: Any) -> None:
        found[place] = event

    return tell
