"""What the machine's matrix product can do at an encoder's shapes: python matmul.py NOTES WIDTH INNER TOKENS."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from lora_cli.products import as_kernels_read, is_available, product
from lora_cli.runs.directory import write_json

SECONDS = 3.0
"""For each shape."""


def best(tokens: int, inputs: int, outputs: int) -> float:
    """GFLOP/s of the fastest product (tokens, inputs) · (inputs, outputs) within SECONDS, by whichever library."""
    x, weight = torch.randn(tokens, inputs), torch.randn(inputs, outputs)
    ways = [lambda: torch.mm(x, weight)]
    if is_available():
        kept = as_kernels_read(weight.T)
        ways.append(lambda: product(x, kept, None))
    fastest, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for way in ways:
            started = time.perf_counter()
            way()
            fastest = min(fastest, time.perf_counter() - started)
    return 2 * tokens * inputs * outputs / fastest / 1e9


def main() -> None:
    """Note the best of each shape, and of all as `gflop_per_s`: the hardest to reach."""
    width, inner, tokens = map(int, sys.argv[2:])
    shapes = [(width, width), (width, inner), (inner, width)]
    found = {f"{tokens}x{inputs}x{outputs}": best(tokens, inputs, outputs) for inputs, outputs in shapes}
    write_json(Path(sys.argv[1]), {"gflop_per_s": max(found.values()), "shapes": found})


if __name__ == "__main__":
    main()
