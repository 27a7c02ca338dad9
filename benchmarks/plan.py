"""What `lora plan` says of a training beside what the training takes: peak memory and time, for 12 configurations.

    python benchmarks/plan.py                     all
    python benchmarks/plan.py --only minilm-lora  some of them

Each pair is two processes, one after the other, on a machine with nothing else to do. Goal: memory within 10 %, time
within 20 %.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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


def main() -> None:
    """Print a line a configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    chosen = parser.parse_args().only
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    print(f"{'':26}{'peak MiB':>18}{'':8}{'steps s':>16}{'':8}{'in all s':>16}")
    for name in chosen:
        found = compared(CASES[name])
        line = f"{name:26}"
        for figure in ("memory", "steps", "all"):
            guess, truth = found[figure], found[f"true {figure}"]
            line += f"{guess:>8,.0f} /{truth:>7,.0f} {guess / truth - 1:>+6.0%}  "
        print(line, flush=True)


if __name__ == "__main__":
    main()
