"""How fast ours is, beside its peers: whole processes in turns, medians and ratios, a table and a JSON.

    python benchmarks/speed.py --cases train-random generation --repeat 3
    python benchmarks/speed.py --page            # docs/performance.md from what has been measured

README.md says what is equal on both sides and what is not.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cases import CASES, DEFAULT, Case, Workplace, profile
from figures import aligned, markdown, replaced, summary, table
from lora_cli.runs.directory import read_json, write_json
from processes import surroundings

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
BLOCK = "measured"
PROFILE = "profile"

Document = dict[str, Any]
"""Name of a case → its surroundings, settings, every turn, medians and ratios."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as the words say, print tables, write everything to --out."""
    args = _parser().parse_args(argv)
    document: Document = read_json(args.out) if args.out.exists() else {}
    if args.page:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), document), encoding="utf-8")
        print(PAGE)
        return 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="speed-") as scratch:
        place = Workplace(Path(scratch), args.threads, args.seed, args.rows)
        for name in args.cases:
            for repeats in turns(name, CASES[name], place, args.repeat):
                document[name] = {**_header(args), "repeats": repeats, **summary(repeats, CASES[name].pairs)}
                # After each turn, so that what has been measured outlives an interruption.
                write_json(args.out, document)
            print(f"\n{name}: {CASES[name].about}\n{aligned(table(repeats, CASES[name].pairs))}", flush=True)
        if args.profile:
            document[PROFILE] = {**_header(args), "top": profile(place)}
            write_json(args.out, document)
            print(f"\n{PROFILE}: 20 steps of train-random\n{aligned(profile_table(document[PROFILE]['top']))}")
    print(f"\n{args.out}")
    return 0


def turns(name: str, case: Case, place: Workplace, number: int) -> Iterable[list[dict[str, Any]]]:
    """All turns so far, after each of `number`; in one, every side runs once."""
    case.prepare(place)
    repeats: list[dict[str, Any]] = []
    for turn in range(number):
        folder, found = place.scratch / name, {}
        folder.mkdir()
        for side, run in case.sides.items():
            started = time.monotonic()
            found[side] = run(place, folder)
            took = time.monotonic() - started
            print(f"{name}, turn {turn + 1} of {number}: {side}, {took:.1f} s", file=sys.stderr)
        shutil.rmtree(folder)
        repeats.append(found)
        yield repeats


def profile_table(top: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Cells: the operators that took longest by themselves."""
    lines = [["operator", "share", "ms/step", "calls/step"]]
    for row in top:
        share, time, calls = f"{row['share']:.1%}", f"{row['ms_per_step']:.1f}", f"{row['calls_per_step']:.0f}"
        lines.append([row["operator"], share, time, calls])
    return lines


def page(text: str, document: Document) -> str:
    """The page's text with the measured block made anew."""
    parts = [_section(name, document[name]) for name in CASES if name in document]
    if PROFILE in document:
        parts.append(f"### {PROFILE}\n\n{markdown(profile_table(document[PROFILE]['top']))}")
    return replaced(text, BLOCK, "\n\n".join(parts or ["Nothing has been measured yet."]))


def _section(name: str, measured: Mapping[str, Any]) -> str:
    settings, case = measured["settings"], CASES[name]
    # A case whose rows are its own says so itself.
    rows = "" if "rows" in case.about else f"{settings['rows']:,} rows; "
    taken = f"{rows}{measured['date'][:10]}, threads: {settings['threads']}, turns: {len(measured['repeats'])}."
    about = f"{case.about[0].upper()}{case.about[1:]}. {taken}"
    return f"### {name}\n\n{about}\n\n{markdown(table(measured['repeats'], case.pairs))}"


def _header(args: argparse.Namespace) -> dict[str, Any]:
    return {**surroundings(), "settings": {"rows": args.rows, "threads": args.threads, "seed": args.seed}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time lora beside PEFT + Trainer, loralib and full fine-tuning, in turns.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(DEFAULT), help="what is measured")
    parser.add_argument("--repeat", type=int, default=3, help="turns of each case")
    parser.add_argument("--rows", type=int, default=1600, help="training rows; the decoder's and prompts', at most")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch, for all sides")
    parser.add_argument("--seed", type=int, default=0, help="of rows, order and start, for all sides")
    parser.add_argument("--profile", action="store_true", help="also where 20 training steps of ours spend their time")
    parser.add_argument("--page", action="store_true", help="measure nothing; write the tables of docs/performance.md")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "speed.json", help="results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
