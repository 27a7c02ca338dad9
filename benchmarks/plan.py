"""What `lora plan` says of a training beside what the training takes: peak memory and time, for 12 configurations.

    python benchmarks/plan.py                     all
    python benchmarks/plan.py --only minilm-lora  some of them
    python benchmarks/plan.py --table             what has been measured, as Markdown

Each pair is two processes, one after the other, on a machine with nothing else to do; with --turns 3 the figures are
the middle ones of three pairs. Goal: memory within 10 %, time within 20 %. What is measured goes into results/plan.json
at once, in the place of what is there of the same name.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from lora_cli.runs.directory import write_json
from processes import surroundings

GPT2 = ("model=tiny-gpt2", "model.random={n_embd:384,n_layer:6,n_head:6,vocab_size:8192,n_positions:512}")
LLAMA = ("model=tiny-llama", "model.random={hidden_size:256,num_hidden_layers:4,intermediate_size:768}")
MINILM = ("model=minilm", "train.epochs=1")
TEXT = ("task=language_modeling", "task.data.train=lines.txt", "task.data.validation=lines.txt", "train.max_steps=20")
CASES: dict[str, tuple[str, ...]] = {
    "minilm-lora": MINILM,
    "minilm-full": (*MINILM, "lora=full"),
    "minilm-qlora": (*MINILM, "lora=qlora"),
    "minilm-r64-all": (*MINILM, "lora.r=64", "lora.targets=[all-linear]"),
    "minilm-batch-8": (*MINILM, "train.batch_size=8"),
    "minilm-batch-128": (*MINILM, "train.batch_size=128"),
    "minilm-padded": (*MINILM, "train.packing=false"),
    "minilm-dropout-off": (*MINILM, "model.dropout=0"),
    "gpt2-128": (*GPT2, *TEXT, "task.max_length=128", "train.batch_size=16"),
    "gpt2-256-full": (*GPT2, *TEXT, "task.max_length=256", "train.batch_size=8", "lora=full"),
    "llama-128": (*LLAMA, *TEXT, "task.max_length=128", "train.batch_size=16"),
    "llama-qlora-accumulated": (*LLAMA, *TEXT, "lora=qlora", "train.batch_size=4", "train.accumulation=4"),
}
"""Name → words of `lora train`."""
LINES = 1500
RESULTS = Path(__file__).resolve().parent / "results" / "plan.json"
GOALS = {"memory": 0.1, "steps": 0.2, "all": 0.2}
"""Figure → how far off it may be."""


def lora(verb: str, words: tuple[str, ...], folder: Path) -> str:
    """Standard output of a command in `folder`."""
    command = [sys.executable, "-m", "lora_cli", verb, *words]
    return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout


def compared(words: tuple[str, ...]) -> dict[str, float]:
    """Foretold and true figures of one configuration."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = [f"line {number} of a text whose words {'go on and ' * (number % 23)}on" for number in range(LINES)]
        (folder / "lines.txt").write_text("\n".join(text) + "\n")
        planned: dict[str, Any] = json.loads(lora("plan", (*words, "plan.alternatives=false", "--json"), folder))
        lora("train", (*words, "hydra.run.dir=run"), folder)
        cost = json.loads((folder / "run" / "run.json").read_text())["cost"]
    return {
        "memory": planned["peak"] / 2**20,
        "true memory": cost["peak_memory_mib"],
        "steps": planned["train_s"],
        "true steps": cost["train_s"],
        "all": planned["total_s"],
        "true all": cost["wall_s"],
    }


def middle(turns: list[dict[str, float]]) -> dict[str, float]:
    """The middle one of each figure."""
    return {name: median(turn[name] for turn in turns) for name in turns[0]}


def rows(found: dict[str, dict[str, float]]) -> list[str]:
    """A Markdown table: foretold / true and how far off; what misses its goal is marked."""
    lines = ["| configuration | peak, MiB | | steps, s | | in all, s | |", "|---|--:|--:|--:|--:|--:|--:|"]
    for name, figures in found.items():
        cells = []
        for figure, goal in GOALS.items():
            guess, truth = figures[figure], figures[f"true {figure}"]
            miss = guess / truth - 1
            cells += [f"{guess:,.0f} / {truth:,.0f}", f"{miss:+.0%}{' (missed)' * (abs(miss) > goal)}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measure and keep, then print the table of all that is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--turns", type=int, default=1, help="pairs of each configuration (default: 1)")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}}
    for name in [] if args.table else args.only:
        found = middle([compared(CASES[name]) for _ in range(args.turns)])
        known = {**surroundings(), "cases": {**known["cases"], name: found}}
        write_json(RESULTS, known)
        print(rows({name: known["cases"][name]})[-1], flush=True)
    print("\n".join(rows({name: known["cases"][name] for name in CASES if name in known["cases"]})))


if __name__ == "__main__":
    main()
