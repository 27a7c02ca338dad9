"""How long it takes to answer with another adapter on the base in memory, and with a whole model that is loaded for it.
Knows saved runs and clocks; nothing of requests.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from lora_cli.engine.device import Device
from lora_cli.engine.evaluate import forward
from lora_cli.models import BaseModel, load_base
from lora_cli.nn import Bank, load_adapter
from lora_cli.prepacked import prepack
from lora_cli.serving.adapters import Entry, Shelf
from lora_cli.serving.pool import Pool
from lora_cli.tasks import load_rows
from lora_cli.unpadded import remove_padding

__all__ = ["Switching", "time_adapters", "time_whole_models"]

_ROUNDS = 20
"""How often each adapter's turn comes."""
_LOADS = 3
"""How often each whole model is loaded."""

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Switching:
    """Milliseconds from one model's answer to another's: medians."""

    rows: int
    """Rows of the batch that is answered."""
    switch_ms: float
    """To change over and answer the first batch."""
    stay_ms: float | None
    """To answer one more with the same; None: not measured."""


def time_adapters(runs: Sequence[Path], device: Device, *, rows: int = 8) -> Switching:
    """Take turns between the adapters of `runs` on one base: each answers the first `rows` rows of its task twice.

    Raises:
        UserError: a run cannot be read, or does not fit the base of the first.
    """
    first, *others = runs
    pool = Pool(Shelf([str(first)]), device, max_adapters=len(runs))
    entries = [pool.first, *(_entry(run) for run in others)]
    for number, entry in enumerate(entries):
        pool.bank.add(str(number), entry.file)
    batches = [_batch(entry, pool.base, device, rows) for entry in entries]
    switching, staying = [], []
    for turn in range(_ROUNDS + 1):
        for number, batch in enumerate(batches):
            times = [_answer(pool.bank.model, batch, device, pool.bank, str(number)) for _ in range(2)]
            # The first round is that of what is done once.
            if turn:
                switching.append(times[0])
                staying.append(times[1])
    return Switching(rows, median(switching), median(staying))


def time_whole_models(runs: Sequence[Path], device: Device, *, rows: int = 8) -> Switching:
    """Load each of these models trained whole anew, and answer the first `rows` rows of its task.

    Raises:
        UserError: a run cannot be read.
    """
    entries = [_entry(run) for run in runs]
    found = []
    for turn in range(_LOADS + 1):
        for entry in entries:
            before = time.perf_counter()
            base = load_base(entry.model, **entry.task.head, seed=entry.seed, dtype=device.dtype, device=device.device)
            base.model.to(device.device)
            load_adapter(base.model, entry.file, fresh=base.fresh, fingerprint=base.fingerprint)
            base.model.eval()
            if entry.packing:
                remove_padding(base.model)
            prepack(base.model, limit_mib=device.prepack_mib, skip=base.fresh)
            loaded = 1000 * (time.perf_counter() - before)
            if turn:
                found.append(loaded + _answer(base.model, _batch(entry, base, device, rows), device))
    return Switching(rows, median(found), None)


def _entry(run: Path) -> Entry:
    (entry,) = Shelf([str(run)]).entries.values()
    return entry


def _batch(entry: Entry, base: BaseModel, device: Device, rows: int) -> Batch:
    """The first rows of the split that the task is scored on."""
    split = entry.task.spec.split
    found = load_rows(entry.task, [split], seed=0)[split]
    examples = entry.task.encode(found.select(range(min(rows, len(found)))), base).examples
    return device.move(entry.task.collate(examples))


def _answer(model: torch.nn.Module, batch: Batch, device: Device, bank: Bank | None = None, name: str = "") -> float:
    """Milliseconds of a forward pass, with the adapter `name` of `bank`."""
    size = len(batch["input_ids"])
    before = time.perf_counter()
    with torch.inference_mode(), device.autocast(), bank.rows([name] * size) if bank else nullcontext():
        forward(model, batch)
    device.synchronize()
    return 1000 * (time.perf_counter() - before)
