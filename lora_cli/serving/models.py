"""Saved runs as Python objects: `load` one, `load_many` on one base. They answer as the server does."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_cli.engine.device import open_device
from lora_cli.errors import ConfigError, UnknownName, UserError
from lora_cli.serving.adapters import Entry, Shelf
from lora_cli.serving.jobs import Job, LabelJob, Piece, WriteJob
from lora_cli.serving.pool import Pool
from lora_cli.serving.scheduler import work_of
from lora_cli.spec import DecodeSpec, DeviceSpec, ModelSpec, TaskSpec
from lora_cli.tasks import Classification, TextTask

__all__ = ["Models", "load", "load_many", "row_of"]

_BATCH_TOKENS = 4096

Text = str | Mapping[str, str] | Sequence[str]
"""A text; of a task with several columns, its cells by column or in their order."""


def load(run: str, *, device: str = "auto", **settings: Any) -> Models:
    """A saved run, or an adapter, ready to answer: `load("runs/latest").predict(["a fine film"])`.

    `settings` are those of `load_many`.

    Raises:
        UserError: it cannot be used.
    """
    return load_many([run], device=device, **settings)


def load_many(
    runs: Sequence[str],
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
        UserError: one of them cannot be used, or does not fit the base of the first one; it is named.
    """
    shelf = Shelf(runs, task=task, model=model)
    opened = open_device(DeviceSpec(name=device, threads=threads))
    pool = Pool(shelf, opened, max_adapters=max_adapters, max_bytes=max_bytes, force_base=force_base)
    return Models(pool, batch_tokens)


class Models:
    """Adapters on one base. One thread at a time."""

    def __init__(self, pool: Pool, batch_tokens: int = _BATCH_TOKENS) -> None:
        self.pool, self._work = pool, work_of(pool, batch_tokens)

    @property
    def names(self) -> list[str]:
        """The adapters, as `model` takes them."""
        return list(self.pool.entries)

    def predict(self, texts: Sequence[Text], model: str | Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The answer to each text, as `lora infer` gives it: label and probabilities, or a value, or a written text.

        `model` names the adapter, or one for each text; None: the first.

        Raises:
            UserError: a name is unknown, or a text cannot be read.
        """
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
        texts: Sequence[Text],
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
        if len(model) != number:
            raise ConfigError("model", list(model), f"one name for each of the {number} texts")
        return list(model)


def row_of(entry: Entry, text: Text) -> dict[str, Any]:
    """The row that is meant by a text for this adapter.

    Raises:
        UserError: its task wants other columns.
    """
    columns = entry.task.columns
    if isinstance(text, Mapping):
        return dict(text)
    if not isinstance(text, str):
        if len(text) != len(columns):
            raise ConfigError("input", "", f"this adapter reads {len(columns)} texts: {', '.join(columns)}")
        return dict(zip(columns, text, strict=True))
    if isinstance(entry.task, Classification) and len(columns) > 1:
        raise ConfigError("input", "", f"this adapter reads several texts: {', '.join(columns)}")
    return {columns[0]: text} if isinstance(entry.task, Classification) else entry.task.row_of(text)


def _decode(entry: Entry, changes: Mapping[str, Any]) -> DecodeSpec:
    assert isinstance(entry.task, TextTask)
    try:
        return replace(entry.task.spec.decode, **changes)
    except TypeError as error:
        raise UserError(f"generate: {error}") from error


def _into(found: list[Any], place: int) -> Any:
    def tell(event: Any) -> None:
        found[place] = event

    return tell
