"""Whether a run that is there already is the one that is asked for and whole, so that nothing is trained twice."""

from __future__ import annotations

from pathlib import Path

from lora_cli.errors import RunError
from lora_cli.runs.directory import RunDirectory
from lora_cli.runs.manifest import changed_files, harmful
from lora_cli.spec import TrainRun
from lora_cli.tasks import build_task, load_rows

__all__ = ["Known", "clear", "damage", "is_current"]

Known = dict[tuple[str, int, tuple[str, ...]], dict[str, str]]
"""Fingerprints by split of rows that were read: by their task, seed and splits."""


def is_current(kept: RunDirectory, spec: TrainRun, known: Known | None = None) -> bool:
    """Whether the run, made by the configuration `spec`, is done and whole, on the very rows that there are now.

    With `known`, rows that are in it are not read again, and others are put into it.

    Raises:
        RunError: the run cannot be read.
        DataError: the rows that there are now cannot be read.
    """
    facts = kept.facts()
    if facts["status"] != "finished" or facts.get("extended") or damage(kept):
        return False
    seed, splits = spec.seed_for("data"), tuple(facts["data"])
    known = {} if known is None else known
    key = (repr(spec.task), seed, splits)
    if key not in known:
        rows = load_rows(build_task(spec.task), splits, seed=seed)
        known[key] = {split: found.fingerprint for split, found in rows.items()}
    return known[key] == {split: part["fingerprint"] for split, part in facts["data"].items()}


def damage(kept: RunDirectory) -> str | None:
    """What of a run cannot be read or, once it is finished, is not what it wrote; None: nothing."""
    try:
        if kept.facts()["status"] != "finished":
            return None
        results = harmful(changed_files(kept.path))
    except RunError as error:
        return str(error)
    return f"{kept.path}: {results[0]} since it finished" if results else None


def clear(folder: Path) -> str | None:
    """Make room in `folder` for the run that a damaged one there was: that gets another name.

    Returns what is wrong with it and where it is now; None: nothing is.
    """
    run = RunDirectory(folder)
    why = damage(run) if run.is_begun else None
    if why is None:
        return None
    aside, number = folder.with_name(f"{folder.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.damaged-{number}")
    folder.rename(aside)
    return f"{why}; kept as {aside}, trained anew"
