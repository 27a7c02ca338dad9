"""What ours is put beside, each in a process of its own: python benchmarks/peers.py KIND RUN NOTES.

A peer takes rows, tokens and settings from the run folder RUN that `lora train` has written, and writes to NOTES what
it reached and how fast. It imports what its users would, and of ours nothing but what reads the run and its rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_cli.runs.directory import write_json
from peer_run import Run

Notes = dict[str, Any]


def trainer(run: Run) -> Notes:
    """PEFT and the Trainer."""
    from peer_trainer import train

    return train(run)


def same_start(run: Run) -> Notes:
    """The same, from our A and head."""
    from peer_trainer import train

    return train(run, start_as_ours=True)


def grouped(run: Run) -> Notes:
    """The same, with rows of like length together."""
    from peer_trainer import train

    return train(run, grouped=True)


def loralib(run: Run) -> Notes:
    """loralib's layers in a plain loop."""
    from peer_loralib import train

    return train(run)


def one_by_one(run: Run) -> Notes:
    """PEFT's generate, prompt by prompt."""
    from peer_generation import answer

    return answer(run, batch_size=1)


def batched(run: Run) -> Notes:
    """PEFT's generate on batches of 32 prompts."""
    from peer_generation import answer

    return answer(run, batch_size=32)


KINDS: dict[str, Callable[[Run], Notes]] = {
    kind.__name__.replace("_", "-"): kind for kind in (trainer, same_start, grouped, loralib, one_by_one, batched)
}


def main(argv: list[str]) -> None:
    """Be the peer that the words name."""
    kind, run, notes = argv
    write_json(Path(notes), KINDS[kind](Run.read(Path(run))))


if __name__ == "__main__":
    main(sys.argv[1:])
