"""`lora` with clocks in it: python benchmarks/ours.py NOTES [--profile] train|eval …; what they show goes to NOTES.

Nothing that `lora` does is replaced, and torch is imported where it imports it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from lora_cli import cli
from lora_cli.commands import eval as scoring
from lora_cli.commands import train as training
from lora_cli.runs.directory import write_json

Notes = dict[str, Any]


def watch_training(notes: Notes, *, profile: bool) -> None:
    """Note the first step, and `eval_s`: how long the last scoring took."""
    build = training.build_task

    def watched(*args: Any) -> Any:
        task = build(*args)
        scorer, watches = task.scorer, False

        def opened() -> Any:
            nonlocal watches
            if not watches:  # The rehearsal: torch is here, and no step has been taken.
                from watch import watch_steps

                watch_steps(notes, profile=profile)
                watches = True
            return _timed(scorer(), notes)

        task.scorer = opened
        return task

    training.build_task = watched


def watch_answers(notes: Notes) -> None:
    """Note the tokens that are written, and how fast."""
    load = scoring.load_rows

    def loaded(*args: Any, **kwargs: Any) -> Any:
        from watch import watch_generation

        watch_generation(notes)
        return load(*args, **kwargs)

    scoring.load_rows = loaded


def _timed(scorer: Any, notes: Notes) -> Any:
    result, started = scorer.result, time.perf_counter()

    def ended() -> Any:
        found = result()
        notes["eval_s"] = time.perf_counter() - started
        scorer.result = result  # What is asked of it again later is no scoring.
        return found

    scorer.result = ended
    return scorer


def main(argv: list[str]) -> int:
    """Run `lora` with the words, and write the notes once it has ended well."""
    file, *words = argv
    profile = words[0] == "--profile"
    notes: Notes = {}
    watch_training(notes, profile=profile)
    watch_answers(notes)
    code = cli.main(words[1:] if profile else words)
    if code == 0:
        write_json(Path(file), notes)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
