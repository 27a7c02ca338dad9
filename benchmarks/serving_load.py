"""How fast many adapters are served over HTTP, beside PEFT behind the same front.

    python benchmarks/serving_load.py                     # writes results/serving.json; needs the mirror's SST-2
    python benchmarks/serving_load.py --adapters 3 --clients 8 --requests 40 --rounds 1
    python benchmarks/serving_load.py --page              # the table of docs/serving.md from what has been measured

Every request is one text for one of the adapters. All sides' servers run from the start, and take turns: a round asks
each of them the same requests, in an order that changes from round to round.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from lora_cli.runs.directory import read_json, write_json
from lora_cli.runs.manifest import write_manifest
from processes import measure, surroundings
from serving_sides import KINDS

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "serving.json"
PAGE = HERE.parent / "docs" / "serving.md"
MARKS = "<!-- measured: begin, by python benchmarks/serving_load.py --page -->", "<!-- measured: end -->"
NAMES = {"ours": "`lora serve`", "peft-mixed": "PEFT, `adapter_names`", "peft-switching": "PEFT, one by one"}
TRAINING = (
    *("task=sst2", "model=minilm", "lora.r=8", "lora.alpha=16", "device=cpu", "train.max_steps=1"),
    *("task.data.train_limit=64", "task.data.validation_limit=320"),
)


@dataclass(frozen=True)
class Ask:
    """One request."""

    model: str
    text: str


@dataclass(frozen=True)
class Round:
    """What one side did in one round."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    answers: list[float]
    """Probability of the first label, by request."""


def main() -> None:
    """Measure, or write the page."""
    args = _arguments()
    if args.page:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), read_json(RESULTS)), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        measure(["-m", "lora_cli", "train", *TRAINING, f"hydra.run.dir={scratch / 'run'}"], scratch, args.threads)
        cases = {str(number): case(scratch, number, args) for number in args.adapters}
    settings = {key: value for key, value in vars(args).items() if key not in ("page", "output")}
    write_json(args.output, {**surroundings(), "settings": settings, "cases": cases})


def case(scratch: Path, number: int, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of every side with `number` adapters."""
    runs = make(scratch, number)
    with servers(scratch, runs, args) as addresses:
        asked = requests(scratch / "run", sorted(path.name for path in runs.iterdir()), args.requests)
        # What is loaded lazily is loaded before anything is timed.
        for address in addresses.values():
            asyncio.run(drive(address, asked[: 4 * number], args.clients))
        rounds: dict[str, list[Round]] = {kind: [] for kind in addresses}
        for turn in range(args.rounds):
            for place in range(len(KINDS)):
                kind = KINDS[(turn + place) % len(KINDS)]
                part = asked if kind != "peft-switching" else asked[: max(1, len(asked) // 4)]
                rounds[kind].append(asyncio.run(drive(addresses[kind], part, args.clients)))
                print(f"{number} adapters, round {turn + 1}, {kind}: {rounds[kind][-1].requests_per_s:.1f} requests/s")
    return {kind: figures(rounds[kind], rounds["ours"]) for kind in KINDS}


def figures(own: Sequence[Round], ours: Sequence[Round]) -> dict[str, Any]:
    """The middle of the rounds, how ours stands beside it round by round, and how far its answers are from ours."""
    pairs = list(zip(own, ours, strict=True))
    return {
        "requests_per_s": median(each.requests_per_s for each in own),
        "p50_ms": median(each.p50_ms for each in own),
        "p99_ms": median(each.p99_ms for each in own),
        "ours_to_this": median(b.requests_per_s / a.requests_per_s for a, b in pairs),
        "rounds": [each.requests_per_s for each in own],
        "largest_difference": max(abs(x - y) for a, b in pairs for x, y in zip(a.answers, b.answers, strict=False)),
    }


def make(scratch: Path, number: int) -> Path:
    """Runs like the first one, each with weights moved its own way; beside them their adapters alone, for PEFT."""
    runs = scratch / f"runs-{number}"
    adapters = scratch / f"{runs.name}-adapters"
    words = ["make", str(scratch / "run"), str(adapters), str(number)]
    measure([str(HERE / "mixed.py"), "-", *words], scratch, 1)
    for adapter in adapters.iterdir():
        shutil.copytree(scratch / "run", runs / adapter.name, ignore=shutil.ignore_patterns("adapter", "checkpoints"))
        shutil.copytree(adapter, runs / adapter.name / "adapter")
        # Another adapter than the run was saved with.
        write_manifest(runs / adapter.name)
    return runs


def requests(run: Path, names: Sequence[str], number: int) -> list[Ask]:
    """Validation texts of the run, each adapter as often as any other."""
    from lora_cli.tasks import build_task, load_rows
    from peer_run import Run

    found = Run.read(run)
    rows = load_rows(build_task(found.task), ["validation"], seed=found.seed)["validation"]
    return [
        Ask(
            names[place * 7 % len(names)] if len(names) % 7 else names[place % len(names)],
            rows[place % len(rows)]["sentence"],
        )
        for place in range(number)
    ]


@contextmanager
def servers(scratch: Path, runs: Path, args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Side → address of its server."""
    words = [str(scratch / "run"), str(runs), str(args.batch_tokens), str(args.threads)]
    started = {
        kind: subprocess.Popen(
            [sys.executable, str(HERE / "serving_sides.py"), kind, *words], stdout=subprocess.PIPE, text=True
        )
        for kind in KINDS
    }
    try:
        yield {kind: str(process.stdout and process.stdout.readline()).strip() for kind, process in started.items()}
    finally:
        for process in started.values():
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)


async def drive(address: str, asked: Sequence[Ask], clients: int) -> Round:
    """Ask everything, `clients` requests at a time, each client over one connection."""
    import aiohttp

    waiting = iter(enumerate(asked))
    seconds, answers = [0.0] * len(asked), [0.0] * len(asked)

    async def client(session: aiohttp.ClientSession) -> None:
        for place, ask in waiting:
            started = time.perf_counter()
            async with session.post(f"{address}/v1/classify", json={"model": ask.model, "input": ask.text}) as found:
                body = await found.json()
                if found.status != 200:
                    raise SystemExit(f"{address}: {found.status}: {body}")
            seconds[place] = time.perf_counter() - started
            answers[place] = next(iter(body["data"][0]["probabilities"].values()))

    connector, timeout = aiohttp.TCPConnector(limit=clients), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        started = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        wall_s = time.perf_counter() - started
    cuts = quantiles(seconds, n=100) if len(seconds) > 1 else seconds * 99
    return Round(len(asked) / wall_s, 1000 * cuts[49], 1000 * cuts[98], answers)


def page(text: str, results: dict[str, Any]) -> str:
    """The page with its table made anew."""
    settings = results["settings"]
    how = ", ".join(f"{settings[key]} {key}" for key in ("clients", "requests", "rounds", "threads"))
    versions = ", ".join(f"{name} {results['versions'][name]}" for name in ("torch", "peft"))
    lines = [
        f"{how}, {settings['batch_tokens']} tokens a batch; {results['date'][:10]}, {versions}.",
        "",
        "| adapters | side | requests/s | p50 ms | p99 ms | `lora serve` is so many times as fast |",
        "|---|---|---|---|---|---|",
    ]
    for number, sides in results["cases"].items():
        for kind, found in sides.items():
            cells = (f"{found[key]:.0f}" for key in ("requests_per_s", "p50_ms", "p99_ms"))
            lines.append(f"| {number} | {NAMES[kind]} | {' | '.join(cells)} | {found['ours_to_this']:.2f} |")
    begin, end = MARKS
    table = "\n".join(lines)
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n\n{table}\n\n{end}", text, flags=re.S)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=lambda text: [int(part) for part in text.split(",")], default=[8, 64])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
