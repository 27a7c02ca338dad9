"""A server as one side of a benchmark: python serving_sides.py KIND RUN RUNS BATCH_TOKENS THREADS.

The HTTP front, the queue and the batches are `lora serve`'s on all sides; what a batch is computed with differs. RUN is
the training that RUNS are like. The first line printed is the address.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_cli.engine.device import open_device
from lora_cli.process import hurry, settle_down
from lora_cli.serving.adapters import Shelf
from lora_cli.serving.api import build_app
from lora_cli.serving.pool import Labelled, Pool, Ready
from lora_cli.serving.scheduler import Scheduler
from lora_cli.serving.server import Ending, address_of, allowed_hosts, listen, open_socket
from lora_cli.spec import DeviceSpec, ServeSpec
from mixed import Work, peft_groups, peft_mixed
from peer_run import Run

KINDS = ("ours", "peft-mixed", "peft-switching")


class PeftPool(Pool):
    """PEFT's model in place of the bank: all adapters are loaded, and stay."""

    def __init__(self, shelf: Shelf, device: Any, work: Work, *, mixes: bool) -> None:
        super().__init__(shelf, device, max_adapters=len(shelf.entries))
        self._mixes = mixes
        self._answer = (peft_mixed if mixes else peft_groups)(work)

    def ready(self, name: str) -> Ready:
        """Nothing is to be loaded."""
        return Ready(self.entries[name], self._tokenizer(self.entries[name]), None, name)

    def hold(self, ready: Ready) -> None:
        """Nothing leaves."""

    def release(self, ready: Ready) -> None:
        """Nothing leaves."""

    def open_lanes(self) -> None:
        """One is all there is: PEFT mixes adapters by hooks on the one model."""

    def logits(self, items: Sequence[Labelled]) -> list[torch.Tensor]:
        """Padded rows in one batch, each with its adapter; or one by one, where the adapter is switched for each."""
        parts = [items] if self._mixes else [[item] for item in items]
        return [row[None] for part in parts for row in self._computed(part)]

    def _computed(self, items: Sequence[Labelled]) -> torch.Tensor:
        batch = self.first.task.collate([item.example for item in items])  # type: ignore[union-attr,arg-type]
        with torch.inference_mode():
            return self._answer(batch, [item.ready.key for item in items])


def pool_of(kind: str, run: Path, runs: Path, device: Any) -> Pool:
    """What a side computes with."""
    shelf = Shelf([str(runs)])
    if kind == "ours":
        return Pool(shelf, device, max_adapters=len(shelf.entries))
    adapters = runs.parent / f"{runs.name}-adapters"
    return PeftPool(shelf, device, Work(Run.read(run), adapters, list(shelf.entries)), mixes=kind == "peft-mixed")


def main() -> None:
    """Serve until the process is ended."""
    kind, run, runs, batch_tokens, threads = sys.argv[1:]
    # As `lora serve`: what is there before the first request is not looked through for garbage again and again.
    hurry()
    spec = ServeSpec(port=0, batch_tokens=int(batch_tokens), max_queue=10_000, max_connections=1000, timeout_s=600.0)
    with open_socket(spec, None) as listener:
        pool = pool_of(kind, Path(run), Path(runs), open_device(DeviceSpec(name="cpu", threads=int(threads))))
        scheduler = Scheduler(pool, batch_tokens=spec.batch_tokens, max_queue=spec.max_queue)

        def started() -> None:
            print(address_of(listener), flush=True)

        hosts = allowed_hosts(spec, None)
        app = build_app(
            scheduler, spec, token=None, hosts=hosts, warn=lambda text: print(text, file=sys.stderr), started=started
        )
        settle_down()
        listen(app, listener, spec, Ending(lambda: scheduler.stop(0.0)))


if __name__ == "__main__":
    main()
