"""The same kills and damages for `lora train` and for PEFT with transformers' Trainer: who ends as if nothing happened?

    python benchmarks/faults.py [--results FILE] [--page]

Each side trains 40 steps of a tiny BERT, a checkpoint every 5, on one thread. Each case starts from a new folder, in
processes of their own: the training is killed with -9 (while a checkpoint is written, or some time later), or stopped
half-way and one file of its newest checkpoint damaged; then the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from processes import surroundings

__all__ = ["main", "table", "verdict"]

RESULTS = Path(__file__).parent / "results" / "faults.json"
AIMED, RANDOM = (10, 20, 30), 4
STOPPED_AFTER = 20
PRELOADED = ["lora_cli.cli", "lora_cli.experiment", "hydra.main", "peft", "transformers.trainer"]
VERDICTS = ("equal", "refused", "silently different", "traceback")
OURS = (
    *("train", "model=tiny-bert", "model.random={hidden_size:64}", "model.dropout=0.1", "lora.targets=[all-linear]"),
    *("task=text_classification", "task.data.train=rows.csv", "task.data.validation=rows.csv", "lora.dropout=0.1"),
    *("train.max_steps=40", "train.save_every=5", "train.eval_every=40", "train.log_every=1", "train.batch_size=8"),
    *("train.lr=7e-3", "train.keep=8", "device.threads=1", "resume=auto", "hydra.run.dir=run"),
)


@dataclass(frozen=True)
class Side:
    """One of the two, and how to look into what it leaves."""

    name: str
    train: Callable[[], None]
    checkpoint: str
    """Name of the folder of a step's checkpoint."""
    being_written: str
    """What begins to exist when it is begun."""
    results: tuple[str, ...]
    """Files that an undisturbed training leaves equal each time."""
    files: Mapping[str, str]
    """What a file of a checkpoint is for → its name."""


def _ours() -> None:
    from lora_cli.cli import main

    sys.exit(main(OURS))


def _peer() -> None:
    from peer_faults import main

    main("run")


SIDES = (
    Side(
        "lora",
        _ours,
        "checkpoints/step-{:06d}",
        "checkpoints/.step-{:06d}.*",
        ("adapter/adapter_model.safetensors", "metrics.jsonl", "predictions/validation.jsonl"),
        {
            "weights": "trained.safetensors",
            "optimizer": "optimizer.safetensors",
            "random state": "manifest.json",
            "progress": "state.json",
        },
    ),
    Side(
        "PEFT + Trainer",
        _peer,
        "checkpoint-{}",
        "checkpoint-{}",
        ("final/adapter_model.safetensors", "losses.txt"),
        {
            "weights": "adapter_model.safetensors",
            "optimizer": "optimizer.pt",
            "random state": "rng_state.pth",
            "progress": "trainer_state.json",
        },
    ),
)
DAMAGES = (
    *(("truncated", what) for what in ("weights", "optimizer", "random state", "progress")),
    *(("deleted", what) for what in ("weights", "optimizer", "random state")),
)


def verdict(code: int, said: str, *, equal: bool) -> str:
    """What became of a training that was taken up again: its exit code, its last words, whether its files are equal."""
    if code == 0:
        return "equal" if equal else "silently different"
    return "traceback" if "Traceback" in said else "refused"


def table(found: Mapping[str, Mapping[str, str]]) -> str:
    """Case by case, and the sums, in Markdown; `found`: side → case → verdict."""
    sides = list(found)
    lines = [f"| case | {' | '.join(sides)} |", "|---" * (len(sides) + 1) + "|"]
    lines += [f"| {case} | {' | '.join(found[side][case] for side in sides)} |" for case in found[sides[0]]]
    for name in VERDICTS:
        sums = (str(list(found[side].values()).count(name)) for side in sides)
        lines.append(f"| **{name}** | {' | '.join(sums)} |")
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """Run all cases on both sides, or with --page print the table of those that were run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="print the table of the results, run nothing")
    given = parser.parse_args(words)
    if not given.page:
        found = {side.name: _all_cases(side) for side in SIDES}
        given.results.write_text(json.dumps({**surroundings(), "cases": found}, indent=2) + "\n", encoding="utf-8")
    print(table(json.loads(given.results.read_text(encoding="utf-8"))["cases"]))
    return 0


def _all_cases(side: Side) -> dict[str, str]:
    with TemporaryDirectory() as name:
        home = Path(name)
        whole = _new(home / "whole")
        code, said = _run(side, whole)
        assert code == 0, said
        again = _new(home / "again")
        assert _outcome(side, again, whole) == "equal", "two undisturbed trainings differ already"
        found = {}
        for step in AIMED:
            folder = _new(home / f"aimed-{step}")
            _run(side, folder, kill=_exists(folder / "run", side.being_written.format(step)))
            found[f"killed while checkpoint {step} is written"] = _outcome(side, folder, whole)
        times = random.Random(0)
        for number in range(RANDOM):
            folder, step, later = _new(home / f"random-{number}"), times.randrange(5, 40, 5), times.uniform(0, 0.1)
            begun = _exists(folder / "run", side.checkpoint.format(step))
            code, _ = _run(side, folder, kill=_later(begun, later))
            assert code == -signal.SIGKILL, "it ended before it could be killed"
            found[f"killed {1000 * later:.0f} ms after checkpoint {step} got its name"] = _outcome(side, folder, whole)
        stopped = _new(home / "stopped")
        _run(side, stopped, kill=_exists(stopped / "run", side.being_written.format(STOPPED_AFTER + 5)))
        shutil.rmtree(stopped / "run" / side.checkpoint.format(STOPPED_AFTER + 5), ignore_errors=True)
        for how, what in DAMAGES:
            folder = Path(shutil.copytree(stopped, home / f"{how}-{what}"))
            file = folder / "run" / side.checkpoint.format(STOPPED_AFTER) / side.files[what]
            content = file.read_bytes()
            file.unlink()
            if how == "truncated":
                file.write_bytes(content[: len(content) // 2])
            found[f"{what} of the newest checkpoint {how}"] = _outcome(side, folder, whole)
    for case, result in found.items():
        print(f"{side.name}: {case}: {result}", file=sys.stderr)
    return found


def _new(folder: Path) -> Path:
    folder.mkdir()
    rows = [f"{'abc'[n % 3] * (n % 5 + 1)} {n * 37 % 101},{'xyz'[n % 3]}\n" for n in range(96)]
    (folder / "rows.csv").write_text("text,label\n" + "".join(rows))
    return folder


def _outcome(side: Side, folder: Path, whole: Path) -> str:
    code, said = _run(side, folder)

    def content(home: Path, name: str) -> bytes | None:
        file = home / "run" / name
        return file.read_bytes() if file.exists() else None

    equal = all(content(folder, name) == content(whole, name) for name in side.results)
    return verdict(code, said, equal=equal)


def _exists(folder: Path, pattern: str) -> Callable[[], bool]:
    return lambda: any(folder.glob(pattern))


def _later(begun: Callable[[], bool], seconds: float) -> Callable[[], bool]:
    """So many seconds after `begun` became true."""
    seen: list[float] = []

    def kill() -> bool:
        if not seen and begun():
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] >= seconds

    return kill


def _run(side: Side, folder: Path, kill: Callable[[], bool] | None = None) -> tuple[int, str]:
    """Exit code and last words of one process, killed as soon as `kill` says so."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    log = folder / "log.txt"
    process: Any = context.Process(target=_in_folder, args=(side.train, folder, log))
    process.start()
    while kill and process.exitcode is None and not kill():
        time.sleep(0.0002)
    if kill:
        process.kill()
    process.join(300)
    return process.exitcode, log.read_text(encoding="utf-8", errors="replace")[-3000:]


def _in_folder(train: Callable[[], None], folder: Path, log: Path) -> None:
    os.chdir(folder)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    train()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
