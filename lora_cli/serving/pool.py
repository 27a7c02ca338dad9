"""One base and the adapters on it that are in memory: they come when they are asked for, and the least recently used
one goes where there is no room. Knows adapters and rows; nothing of requests, threads or HTTP.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_cli.engine.device import Device
from lora_cli.engine.evaluate import forward
from lora_cli.errors import AdapterError, LoraError, UnknownName, printable
from lora_cli.models import BaseModel, load_base
from lora_cli.nn import Bank
from lora_cli.nn.targets import FULL
from lora_cli.prepacked import prepack
from lora_cli.serving.adapters import Entry, Shelf, Stamp
from lora_cli.tasks import Classification, Rows
from lora_cli.tasks.encoding import Example
from lora_cli.tokenizer import load_tokenizer
from lora_cli.unpadded import remove_padding

__all__ = ["Full", "Labelled", "Pool", "Ready", "Unavailable"]

_LANES = 2
"""Batches that a CPU computes at once."""


class Unavailable(LoraError):  # noqa: N818 - it is what it says
    """An adapter that is known cannot be used now; its text may be shown to a client."""


class Full(Unavailable):
    """There is no room for an adapter until one that is in use is released."""


@dataclass(frozen=True)
class Ready:
    """An adapter with what it needs to read a row: what tasks call a reader."""

    entry: Entry
    tokenizer: Any
    decoder_start: int | None
    key: str
    """What the bank calls this version of it."""


@dataclass(frozen=True)
class Labelled:
    """A row to be classified."""

    ready: Ready
    example: Example

    @property
    def num_tokens(self) -> int:
        """Tokens of all its sequences."""
        return sum(map(len, self.example.input_ids))


class Pool:
    """Adapters of `shelf` on the base of the first one. All methods are one thread's, or of who holds `lock`; but
    `logits` and `classify` are for as many threads at once as there are lanes.

    At most `max_adapters` of them are in memory, which take `max_bytes` at most (None: no limit) beside the base; one
    that is in use stays. With `watch` an adapter that changed on disk is read anew when it is next asked for.

    Raises:
        UserError: a run does not fit the base of the first one; it is named.
    """

    def __init__(
        self,
        shelf: Shelf,
        device: Device,
        *,
        max_adapters: int = 64,
        max_bytes: int | None = None,
        watch: bool = False,
        force_base: bool = False,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.shelf, self.device, self.lock = shelf, device, threading.RLock()
        self.entries = dict(shelf.entries)
        """Those that can be asked for: name → adapter."""
        self.num_loaded = self.num_evicted = self.num_reloaded = 0
        self.max_adapters, self._max_bytes, self._watch = max_adapters, max_bytes, watch
        self._force_base, self.warn = force_base, warn
        self.first = next(iter(self.entries.values()))
        self.base = _base_of(self.first, device)
        self.bank = Bank(self.base.model, fresh=self.base.fresh, fingerprint=self.base.fingerprint)
        self._loaded: OrderedDict[str, Ready] = OrderedDict()
        """Name → its newest version in memory, the least recently used one first."""
        self._held: Counter[str] = Counter()
        self._num_versions = 0
        self._banks = [self.bank]
        """Those in which nothing is computed right now."""
        self.num_lanes = 1
        """How many threads may compute at once, each by `classify`."""
        self._tokenizers: dict[str, Any] = {}
        self._damaged: dict[str, Stamp] = {}
        """What could not be loaded, of which has been told."""
        for entry in self.entries.values():
            self._check(entry)

    @property
    def writes(self) -> bool:
        """Whether the base answers with text."""
        return self.first.writes

    @property
    def loaded(self) -> list[str]:
        """The adapters in memory."""
        return list(self._loaded)

    @property
    def bytes(self) -> int:
        """What they take beside the base."""
        return sum(self.bank.bytes.values())

    def open_lanes(self) -> None:
        """Let on a CPU two threads compute at once, each with its part of torch's: operations of a batch wait for all
        of these again and again, and these for Python.
        """
        threads = torch.get_num_threads()
        if not self.writes and self.device.device.type == "cpu" and threads > 1:
            self.num_lanes, self._banks = _LANES, [self.bank.beside() for _ in range(_LANES)]
            torch.set_num_threads(max(1, threads // _LANES))

    def put(self, name: str) -> Entry:
        """Let an adapter be asked for that lies in one of the folders; it is read anew if it is there already.

        Raises:
            UnknownName: none of the folders has it.
            UserError: it cannot be read, or does not fit the base.
        """
        if name not in self.shelf.look_again():
            raise UnknownName("model", name, (), "adapter")
        entry = self.shelf.read(name)
        self._check(entry)
        self._forget(name)
        self.entries[name] = entry
        return entry

    def drop(self, name: str) -> None:
        """Let it not be asked for any more.

        Raises:
            UnknownName: there is none of this name.
        """
        self._check_known(name)
        del self.entries[name]
        self._forget(name)

    def ready(self, name: str) -> Ready:
        """The adapter called `name`, in memory from now on.

        Raises:
            UnknownName: there is none.
            Unavailable: it cannot be loaded.
            Full: there is no room beside those that are in use.
        """
        self._check_known(name)
        found = self._loaded.get(name)
        if found is None or (self._watch and self.shelf.has_changed(found.entry)):
            stamp = self.shelf.stamp_of(self.entries[name])
            try:
                found = self._load(name, found)
            except Full:
                # There is room for its new version once the one that is in use is let go of.
                if found is None:
                    raise
            except (LoraError, OSError) as error:
                if self._damaged.get(name) != stamp:
                    self._damaged[name] = stamp
                    self.warn(f"{name}: {error}")
                if found is None:
                    raise Unavailable(f"the adapter {name} cannot be loaded") from error
        self._loaded.move_to_end(name)
        return found

    @property
    def is_in_use(self) -> bool:
        """Whether an adapter is held."""
        return bool(self._held)

    def hold(self, ready: Ready) -> None:
        """Keep this version of an adapter in memory until it is released as often."""
        self._held[ready.key] += 1

    def release(self, ready: Ready) -> None:
        """It is not in use any more."""
        self._held[ready.key] -= 1
        if not self._held[ready.key]:
            del self._held[ready.key]
            if self._loaded.get(ready.entry.name) != ready:
                self.bank.remove(ready.key)

    def encode(self, ready: Ready, rows: Sequence[dict[str, Any]]) -> list[Labelled]:
        """The rows of a task that has labels, as the model reads them.

        Raises:
            DataError: a column is missing, or a cell is no text.
        """
        task = ready.entry.task
        assert isinstance(task, Classification)
        found = task.encode_texts(Rows(rows, source="input", separator=" ", numbers=range(len(rows))), ready)
        return [Labelled(ready, example) for example in found.examples]

    def logits(self, items: Sequence[Labelled]) -> list[torch.Tensor]:
        """The logits of each row (sequences, outputs), all of them from one forward pass."""
        task = items[0].ready.entry.task
        assert isinstance(task, Classification)
        batch = self.device.move(task.collate([item.example for item in items]))
        sizes = [len(item.example.input_ids) for item in items]
        names = [item.ready.key for item, size in zip(items, sizes, strict=True) for _ in range(size)]
        with self._lane() as bank, torch.inference_mode(), self.device.autocast(), bank.rows(names):
            found = forward(bank.model, batch).float().cpu()
        return [rows[:, : _num_outputs(item)] for item, rows in zip(items, torch.split(found, sizes), strict=True)]

    def classify(self, items: Sequence[Labelled]) -> list[dict[str, Any]]:
        """The answer to each row: label and probabilities, or a value."""
        found = []
        for item, logits in zip(items, self.logits(items), strict=True):
            assert isinstance(item.ready.entry.task, Classification)
            found += item.ready.entry.task.decode(logits)
        return found

    @contextmanager
    def _lane(self) -> Iterator[Bank]:
        bank = self._banks.pop()
        try:
            yield bank
        finally:
            self._banks.append(bank)

    def _check_known(self, name: str) -> None:
        if name not in self.entries:
            raise UnknownName("model", name, self.entries, "adapter")

    def _check(self, entry: Entry) -> None:
        """Refuse what cannot be on this base."""
        first, where = self.first, f"run={entry.path}"
        if entry.file.config.spec.variant == FULL:
            raise AdapterError(f"{where}: a model trained whole shares nothing with a base; serve it by itself")
        if entry.writes != first.writes:
            does, other = ("writes", "classifies") if entry.writes else ("classifies", "writes")
            raise AdapterError(f"{where}: it {does}, and {first.path} {other}: another head; two servers")
        for what, own, theirs in (
            ("model.add_tokens", entry.model.add_tokens, first.model.add_tokens),
            ("model.quantization", entry.model.quantization, first.model.quantization),
        ):
            if own != theirs:
                raise AdapterError(f"{where}: {what}={own}, and {first.path} has {theirs}: another base")
        known = entry.file.fingerprint
        if known is not None and known != self.base.fingerprint and not self._force_base:
            name, other = printable(entry.file.config.base_name, 60), f"{first.path} ({self.base.base_name})"
            if name == self.base.base_name:
                name = "the same name, other weights: the fingerprints differ, as of random bases of two seeds"
            raise AdapterError(f"{where}: trained on another base than {other}: {name}")
        self._tokenizer(entry)
        if known is None:
            # Nothing but its tensors tells whether it fits.
            self.bank.add("trial", entry.file, force_base=self._force_base)
            self.bank.remove("trial")

    def _load(self, name: str, before: Ready | None) -> Ready:
        entry = self.entries[name]
        if self.shelf.has_changed(entry) or not entry.file.folder.is_dir():
            entry = self.shelf.read(name)
            self._check(entry)
            self.entries[name] = entry
        self._make_room(name)
        self._num_versions += 1
        key = f"{name}@{self._num_versions}"
        self.bank.add(key, entry.file, force_base=self._force_base)
        ready = Ready(entry, self._tokenizer(entry), self.base.decoder_start, key)
        if before is not None:
            self.num_reloaded += 1
            self._forget(name)
        self._loaded[name] = ready
        self.num_loaded += 1
        self._evict(name, lambda: self._max_bytes is not None and self.bytes > self._max_bytes)
        return ready

    def _make_room(self, name: str) -> None:
        """For the adapter called `name`: for one more, or in the place of its version in memory, which goes last."""
        before = self._loaded.get(name)
        replaced = int(before is not None and before.key not in self._held)

        def is_full() -> bool:
            return len(self.bank.names) - replaced >= self.max_adapters

        self._evict(name, is_full)
        if is_full():
            raise Full("all adapters that fit into memory are in use; try again")

    def _evict(self, kept: str, is_full: Callable[[], bool]) -> None:
        """Forget what is not in use, but for `kept`, until there is room."""
        for name in [name for name, ready in self._loaded.items() if ready.key not in self._held and name != kept]:
            if not is_full():
                return
            self._forget(name)
            self.num_evicted += 1

    def _forget(self, name: str) -> None:
        ready = self._loaded.pop(name, None)
        if ready is not None and ready.key not in self._held:
            self.bank.remove(ready.key)

    def _tokenizer(self, entry: Entry) -> Any:
        """The run's own; runs with the same files share one."""
        if entry.tokenizer is None:
            return self.base.tokenizer
        digest = _digest(file for file in sorted(entry.tokenizer.iterdir()) if file.is_file())
        if digest not in self._tokenizers:
            self._tokenizers[digest] = load_tokenizer(entry.tokenizer)
        return self._tokenizers[digest]


def _base_of(entry: Entry, device: Device) -> BaseModel:
    base = load_base(entry.model, **entry.task.head, seed=entry.seed, dtype=device.dtype, device=device.device)
    base.model.to(device.device)
    base.model.eval()
    if entry.packing:
        remove_padding(base.model)
    prepack(base.model, limit_mib=device.prepack_mib, skip=base.fresh)
    return base


def _num_outputs(item: Labelled) -> int:
    assert isinstance(item.ready.entry.task, Classification)
    return item.ready.entry.task.num_outputs


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        data = file.read_bytes()
        digest.update(f"{file.name}:{len(data)}:".encode() + data)
    return digest.hexdigest()
