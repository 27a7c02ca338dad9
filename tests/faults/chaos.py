"""One training, killed again and again at random times, beside one that is left alone: make chaos

Both must leave the same bytes. Each attempt is a process of its own and the same command, with resume=auto.
"""

from __future__ import annotations

import random
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import forked
from commands.conftest import FILMS, TINY, write_films

__all__ = ["EQUAL", "Chaos", "chaos"]

EQUAL = ("adapter/adapter_model.safetensors", "metrics.jsonl", "predictions/validation.jsonl")
STEPS_PER_KILL = 6
WORDS = (
    *("train", *TINY, *FILMS, "model.dropout=0.1", "train.batch_size=2", "train.accumulation=2", "train.keep=2"),
    *("train.save_every=3", "train.log_every=1", "train.eval_every=30", "resume=auto"),
)


@dataclass(frozen=True)
class Chaos:
    """What happened, in seconds and steps."""

    kills: int
    kills_in_save: int
    """After which an unfinished checkpoint lay there."""
    attempts: int
    steps: int
    steps_again: int
    """Steps that were done and lost, as far as metrics.jsonl knows."""
    whole_s: float
    killed_s: float
    differ: tuple[str, ...]
    """Files that are not equal."""

    @property
    def lost_s(self) -> float:
        """Time that a kill costs: what was done since the last checkpoint, and starting anew."""
        return (self.killed_s - self.whole_s) / max(1, self.kills)


def chaos(home: Path, kills: int, seed: int = 0) -> Chaos:
    """Train in the folder `home` with so many kills -9 at random times, and without."""
    write_films(home)
    steps = max(72, STEPS_PER_KILL * kills)
    words = [*WORDS, f"train.max_steps={steps}"]
    # The server that forks takes seconds to start, once.
    forked.run(["--version"], home)
    started = time.monotonic()
    done = forked.run([*words, "hydra.run.dir=whole"], home)
    assert done.returncode == 0, done.stderr
    whole_s, rng = time.monotonic() - started, random.Random(seed)
    started = time.monotonic()
    first = forked.run([*words[:-1], "train.max_steps=1", "hydra.run.dir=short"], home)
    assert first.returncode == 0, first.stderr
    # Most attempts get beyond their start, some do not.
    start_s = time.monotonic() - started
    killed = in_save = attempts = again = reached = 0
    started = time.monotonic()
    while True:
        attempts += 1
        # One that is further than its kills dies young, or it would end before it has had them all: a machine that had
        # much to do while the start was timed starts quicker later.
        longest = 0.4 * start_s if reached / steps > killed / kills else start_s + 0.5
        life = rng.uniform(0.05 * start_s, longest) if killed < kills else None
        done = forked.run([*words, "hydra.run.dir=run"], home, kill_after_s=life)
        if found := re.search(r"from step (\d+)", done.stderr):
            again += max(0, reached - int(found[1]))
        if done.returncode != -signal.SIGKILL:
            break
        killed += 1
        in_save += any((home / "run").glob("checkpoints/.step-*"))
        reached = _last_step(home / "run" / "metrics.jsonl")
    killed_s = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    differ = tuple(name for name in EQUAL if (home / "run" / name).read_bytes() != (home / "whole" / name).read_bytes())
    return Chaos(killed, in_save, attempts, steps, again, whole_s, killed_s, differ)


def _last_step(metrics: Path) -> int:
    text = metrics.read_text() if metrics.exists() else ""
    return max(map(int, re.findall(r'"step": (\d+)', text)), default=0)


def main(words: list[str]) -> int:
    """Print what came of so many kills; 1 if anything differs."""
    with TemporaryDirectory() as folder:
        found = chaos(Path(folder), int(words[0]) if words else 100)
    print(f"{found.kills} kills -9 ({found.kills_in_save} while a checkpoint was written), {found.attempts} starts")
    print(f"{found.steps} steps, {found.steps_again} of them done again")
    print(f"{found.whole_s:.1f} s undisturbed, {found.killed_s:.1f} s with kills: {found.lost_s:.2f} s lost per kill")
    print(f"different: {', '.join(found.differ) or 'nothing'} (compared: {', '.join(EQUAL)})")
    return bool(found.differ)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
