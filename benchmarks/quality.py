"""Ours beside PEFT + transformers' Trainer on the same work: metrics, speed, memory.

Each side is a process of its own, in turns, on the same rows with the same settings: the peer takes them from the
run folder that `lora train` has just written. README.md says what is equal and what is not.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from figures import aligned
from lora_cli.runs.directory import RunDirectory, read_json, write_json
from lora_cli.spec import TrainSpec
from processes import measure, surroundings

GLUE = ("sst2", "cola", "mrpc", "rte", "stsb", "qnli")
PEERS = Path(__file__).resolve().parent / "peers.py"
HEADER = (
    *("task", "seed", "rows", "metric", "ours", "peer", "diff", "ours rows/s", "peer rows/s", "ratio"),
    *("ours wall s", "peer wall s", "ours MiB", "peer MiB"),
)


@dataclass(frozen=True)
class Side:
    """What one process reached and what it cost; wall time and memory are taken from outside, alike for both."""

    metrics: Mapping[str, float | None]
    """Of the validation split, after training."""
    train_rows_per_s: float
    """Over the training steps alone: no start, no scoring, no saving."""
    wall_s: float
    peak_rss_mib: float


@dataclass(frozen=True)
class Comparison:
    """Ours and the peer on one task with one seed. `metric` is the task's first."""

    task: str
    seed: int
    rows: int
    metric: str
    ours: Side
    peer: Side


def main(argv: Sequence[str] | None = None) -> int:
    """Compare as the words say, print a table, write everything to --out."""
    args = _parser().parse_args(argv)
    comparisons: list[Comparison] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quality-") as scratch:
        for seed in args.seeds:
            for task in args.tasks:
                comparisons.append(compare(args, task, seed, Path(scratch)))
                print(f"{task}, seed {seed}: done", file=sys.stderr)
                # After each, so that what has been measured outlives an interruption.
                write_json(args.out, _document(args, comparisons))
    print(table(comparisons))
    print(args.out)
    return 0


def compare(args: argparse.Namespace, task: str, seed: int, scratch: Path) -> Comparison:
    """One task with one seed: ours, then the peer with what ours says it did."""
    run = scratch / f"{task}-{seed}"
    words = [f"task={task}", f"seed={seed}", *_overrides(args), f"hydra.run.dir={run}"]
    notes = run / "peer.json"
    ours_cost = measure(["-m", "lora_cli", "train", *words], scratch, args.threads)
    peer_cost = measure([str(PEERS), "same-start", str(run), str(notes)], scratch, args.threads)
    facts, theirs = RunDirectory(run).facts(), read_json(notes)
    metrics = facts["metrics"]["validation"]
    return Comparison(
        task=task,
        seed=seed,
        rows=facts["data"]["train"]["rows"],
        metric=next(iter(metrics)),
        ours=Side(metrics, facts["cost"]["rows_per_s"], *ours_cost),
        peer=Side(theirs["metrics"], theirs["train_rows_per_s"], *peer_cost),
    )


def table(comparisons: Iterable[Comparison]) -> str:
    """One aligned line for each comparison, below a line of names."""
    return aligned([HEADER, *map(_cells, comparisons)])


def _overrides(args: argparse.Namespace) -> list[str]:
    return [
        *("model=minilm", "lora.r=8", "lora.alpha=16", "device=cpu", "device.precision=fp32"),
        f"lora.dropout={args.dropout}",
        *(["model.dropout=0"] if args.dropout == 0 else []),
        f"train.epochs={args.epochs}",
        f"train.lr={args.lr}",
        f"train.batch_size={args.batch}",
        f"train.length_window={args.length_window}",
        f"task.data.train_limit={args.rows}",
        *args.set,
    ]


def _cells(comparison: Comparison) -> tuple[str, ...]:
    ours, peer = comparison.ours, comparison.peer
    value, other = ours.metrics[comparison.metric], peer.metrics[comparison.metric]
    return (
        *(comparison.task, str(comparison.seed), str(comparison.rows), comparison.metric),
        *("undefined" if score is None else f"{score:.4f}" for score in (value, other)),
        "" if value is None or other is None else f"{value - other:+.4f}",
        *(f"{side.train_rows_per_s:.1f}" for side in (ours, peer)),
        f"{ours.train_rows_per_s / peer.train_rows_per_s:.2f}",
        *(f"{side.wall_s:.1f}" for side in (ours, peer)),
        *(f"{side.peak_rss_mib:.0f}" for side in (ours, peer)),
    )


def _document(args: argparse.Namespace, comparisons: Iterable[Comparison]) -> dict[str, Any]:
    return {
        **surroundings(),
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train LoRA on MiniLM with lora train and with PEFT + Trainer, in turns, and compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=[*GLUE, "support_intents"],
        default=list(GLUE),
        help="GLUE, or the set shipped here",
    )
    parser.add_argument("--rows", type=int, default=6000, help="training rows at most")
    parser.add_argument("--epochs", type=int, default=1, help="passes over them")
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one comparison for each")
    parser.add_argument("--batch", type=int, default=32, help="rows per step")
    parser.add_argument(
        "--length-window", type=int, default=TrainSpec().length_window, help="ours: train.length_window; 1: as the peer"
    )
    parser.add_argument("--dropout", type=float, default=0.1, help="of the adapter; 0: none in the base model either")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more keys of lora train, for both")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of torch, for both")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.json"), help="results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
