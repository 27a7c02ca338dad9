"""Whether a run that is there already is the one that is asked for, so that nothing is trained twice."""

from __future__ import annotations

from lora_cli.runs.directory import RunDirectory
from lora_cli.spec import TrainRun
from lora_cli.tasks import build_task, load_rows

__all__ = ["is_current"]


def is_current(kept: RunDirectory, spec: TrainRun) -> bool:
    """Whether the run, made by the configuration `spec`, is done, on the very rows that there are now.

    Raises:
        DataError: the rows that there are now cannot be read.
    """
    facts = kept.facts()
    if facts["status"] != "finished" or facts.get("extended"):
        return False
    task, seed = build_task(spec.task), spec.seed_for("data")
    known = {split: part["fingerprint"] for split, part in facts["data"].items()}
    rows = load_rows(task, list(known), seed=seed)
    return known == {split: found.fingerprint for split, found in rows.items()}
