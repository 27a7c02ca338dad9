"""How time and memory of a training grow: rows, length, r, adapted layers, each point a process of its own.

    python benchmarks/growth.py
    python benchmarks/growth.py --series length r --threads 1
    python benchmarks/growth.py --page           # docs/performance.md and the plot from what has been measured

Texts are generated, all of a series equally long, so that nothing but the one figure changes.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression
from typing import Any

from cases import LORA, Workplace
from figures import aligned, markdown, replaced
from lora_cli.dot_plot import Panel, dot_plot
from lora_cli.runs.directory import RunDirectory, read_json, write_json
from processes import surroundings

ROOT = Path(__file__).resolve().parents[1]
PAGE, PLOT = ROOT / "docs" / "performance.md", ROOT / "docs" / "images" / "growth.svg"
BLOCK = "growth"
WORDS = ("the", "film", "is", "good", "and", "bad", "but", "not", "very", "long", "in", "its", "first", "half", "with")
"""Each is one token of MiniLM's."""
SPECIAL = 2
"""Tokens of a text besides its words."""
FLAT = 0.05
"""What is added, as a share of the first point, up to which nothing grows as far as can be seen."""
MEASURES = {
    "step_s": ("ms a step", 1000, "ms"),
    "peak_rss_mib": ("peak MiB", 1, "MiB"),
    "first_step_s": ("first step s", 1, "s"),
}
"""Measure → how a column is called, its factor, its unit."""

Point = Mapping[str, float]
"""x, and the measures."""


@dataclass(frozen=True)
class Series:
    """What grows: points, and what a training is told at one; `rows` and `length` are those of its texts."""

    about: str
    points: Sequence[int | str]
    word: str
    """Of the command line, {} for the point; empty: rows or length."""
    rows: int = 512
    length: int = 64


SERIES = {
    "rows": Series("training rows of 16 tokens", (1000, 4000, 15_000, 60_000), "", length=16),
    "length": Series("tokens of each row", (16, 32, 64, 128, 256, 512), ""),
    "r": Series("rank, rows of 64 tokens", (1, 4, 16, 64, 256), "lora.r={}"),
    "layers": Series("adapted layers, rows of 64 tokens", ("default", "attention", "all-linear"), "lora.targets=[{}]"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as the words say, print the table, write everything to --out."""
    args = _parser().parse_args(argv)
    document: dict[str, Any] = read_json(args.out) if args.out.exists() else {}
    if args.page:
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), BLOCK, block(document)), encoding="utf-8")
        PLOT.write_text(plot(document), encoding="utf-8")
        print(f"{PAGE}\n{PLOT}")
        return 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="growth-") as scratch:
        place = Workplace(Path(scratch), args.threads, args.seed, rows=0)
        for name in args.series:
            points: list[Point] = []
            for point in SERIES[name].points[: args.points]:
                points.append(measured(place, name, point, args.steps, args.batch))
                print(f"{name} {point}: {points[-1]}", file=sys.stderr)
                settings = {"threads": args.threads, "steps": args.steps, "batch_size": args.batch, "seed": args.seed}
                document[name] = {**surroundings(), "settings": settings, "points": points}
                write_json(args.out, document)
    print(f"{aligned(table(document))}\n\n{args.out}")
    return 0


def measured(place: Workplace, name: str, point: int | str, steps: int, batch: int) -> Point:
    """One training of a few steps in a process of its own."""
    series = SERIES[name]
    rows = int(point) if name == "rows" else max(series.rows, steps * batch)
    length = int(point) if name == "length" else series.length
    with tempfile.TemporaryDirectory(dir=place.scratch) as temporary:
        folder = Path(temporary)
        _write(folder / "train.csv", rows, length, place.seed)
        _write(folder / "validation.csv", batch, length, place.seed + 1)
        run, words = folder / "run", [series.word.format(point)] if series.word else []
        data = [f"task.data.{split}={folder / f'{split}.csv'}" for split in ("train", "validation")]
        limits = [f"train.max_steps={steps}", f"train.eval_every={steps}", f"train.batch_size={batch}"]
        task = ["task=text_classification", "task.label=label", "task.max_length=512", "model=minilm", "device=cpu"]
        told, cost = place.run(
            "ours.py",
            ["train", *task, *LORA, *data, *limits, *words, f"seed={place.seed}", f"hydra.run.dir={run}"],
            folder,
        )
        layers = sum(row["layers"] for row in RunDirectory(run).facts()["targets"])
    return {
        "x": layers if name == "layers" else float(point),
        "step_s": told["step_s"],
        "peak_rss_mib": cost["peak_rss_mib"],
        "first_step_s": told["first_step_s"],
    }


def exponent(points: Sequence[Point], measure: str) -> float | None:
    """k of y - y0 ~ (x - x0)^k, fitted over the points after the first; None: nothing grows that could be seen.

    What every process costs, however small its work, is no growth: it would hide the exponent of a total. What is
    linear gives 1, what is quadratic about 1.7 over the points that are measured here.
    """
    first, *rest = points
    added = [(point["x"] - first["x"], point[measure] - first[measure]) for point in rest]
    seen = [(math.log(x), math.log(y)) for x, y in added if y > FLAT * first[measure]]
    return linear_regression(*zip(*seen, strict=True)).slope if len(seen) > 1 else None


def table(document: Mapping[str, Any]) -> list[list[str]]:
    """Cells: a line for each series, with the ends of each measure and its exponent."""
    lines = [["", "from, to", *(cell for name, _, _ in MEASURES.values() for cell in (name, "exponent"))]]
    for name in [name for name in SERIES if name in document]:
        points = document[name]["points"]
        line = [SERIES[name].about, _ends(points, "x", 1)]
        for measure, (_, factor, _) in MEASURES.items():
            found = exponent(points, measure)
            line += [_ends(points, measure, factor), "flat" if found is None else f"{found:.2f}"]
        lines.append(line)
    return lines


def block(document: Mapping[str, Any]) -> str:
    """What stands on the page."""
    if not document:
        return "Nothing has been measured yet."
    newest = max(document.values(), key=lambda series: str(series["date"]))
    settings = newest["settings"]
    taken = f"{newest['date'][:10]}, threads: {settings['threads']}, batches of {settings['batch_size']}."
    return f"{taken}\n\n{markdown(table(document))}\n\n![What grows, and what with it](images/{PLOT.name})"


def plot(document: Mapping[str, Any]) -> str:
    """Every point as a row, a panel for each measure, all axes logarithmic."""
    rows = {
        f"{point['x']:,.0f} {name}": point for name in SERIES if name in document for point in document[name]["points"]
    }
    panels = [
        Panel(
            title,
            {row: [point[measure] * factor] for row, point in rows.items()},
            lambda value, unit=unit: f"{value:,.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}",
            axis="log",
        )
        for measure, (title, factor, unit) in MEASURES.items()
    ]
    return dot_plot("Growth of a training", list(rows), panels)


def _ends(points: Sequence[Point], measure: str, factor: float) -> str:
    ends = (points[end][measure] * factor for end in (0, -1))
    return ", ".join(f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" for value in ends)


def _write(file: Path, rows: int, length: int, seed: int) -> None:
    """Texts of `length` tokens, and one of two labels each."""
    drawn = random.Random(seed)
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["text", "label"])
        for number in range(rows):
            writer.writerow([" ".join(drawn.choices(WORDS, k=length - SPECIAL)), ("no", "yes")[number % 2]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time and memory of a training against what it is made of.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--series", nargs="*", choices=list(SERIES), default=list(SERIES), help="what grows")
    parser.add_argument("--points", type=int, default=None, help="the first ones of each series only; None: all")
    parser.add_argument("--steps", type=int, default=20, help="of each training")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--seed", type=int, default=0, help="of texts, order and start")
    parser.add_argument("--page", action="store_true", help="measure nothing; write docs/performance.md and the plot")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "growth.json", help="results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
