"""What a list of runs tells of each: a line of facts, whatever state the run is in."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lora_cli.errors import RunError
from lora_cli.runs.directory import RunDirectory, read_json, read_saved_config
from lora_cli.spec import LOSS_DOWNWARDS

__all__ = ["Summary", "summary"]


@dataclass(frozen=True)
class Summary:
    """One run. What a run has not got yet, or cannot be read, is None."""

    path: str
    status: str
    """running, finished, failed, interrupted, pruned (by a search), or damaged."""
    started: str | None = None
    task: str | None = None
    model: str | None = None
    method: str | None = None
    """Variant and rank, such as dora r=8."""
    metric: str | None = None
    """The task's first metric on its split, such as validation/accuracy."""
    value: float | None = None
    parameters: int | None = None
    train_s: float | None = None
    steps: int | None = None
    error: str | None = None

    def rank(self, order: str) -> tuple[bool, float]:
        """Where it stands when sorted by `order`, one of RUN_ORDERS; runs without a value come last."""
        value: float | None = None
        if order == "started" and self.started is not None:
            value = -_seconds(self.started)
        elif order == "metric" and self.value is not None:
            lower_is_better = (self.metric or "").rpartition("/")[2] in LOSS_DOWNWARDS
            value = self.value if lower_is_better else -self.value
        elif order == "parameters" and self.parameters is not None:
            value = self.parameters
        elif order == "time" and self.train_s is not None:
            value = self.train_s
        return value is None, value or 0.0


def summary(run: RunDirectory) -> Summary:
    """The line of `run`."""
    try:
        facts, config = run.facts(), read_saved_config(run.path)
        return _read(run, facts, config)
    except (RunError, KeyError, TypeError, AttributeError) as error:
        return Summary(str(run.path), "damaged", error=str(error))


def _read(run: RunDirectory, facts: Mapping[str, Any], config: Mapping[str, Any]) -> Summary:
    lora, task = config["lora"], config["task"]
    method = "full" if lora["variant"] == "full" else f"{lora['variant']} r={lora['r']}" if lora["targets"] else "head"
    name = task["metrics"][0] if task["metrics"] else "loss"
    return Summary(
        path=str(run.path),
        status=_status(run, facts["status"]),
        started=facts.get("started"),
        task=task["name"],
        model=config["model"]["name"],
        method=method,
        metric=f"{task['split']}/{name}",
        value=facts.get("metrics", {}).get(task["split"], {}).get(name),
        parameters=facts.get("parameters", {}).get("trainable"),
        train_s=facts.get("cost", {}).get("train_s"),
        steps=facts.get("steps"),
        error=facts.get("error") if facts["status"] != "finished" else None,
    )


def _status(run: RunDirectory, noted: str) -> str:
    """What is `noted` in the run, but for what a killed process could not note, and what only a search knows."""
    if noted == "running" and not run.is_held:
        return "interrupted"
    if noted == "interrupted":
        with suppress(RunError):
            job = read_json(run.path.parent / "jobs" / f"{run.path.name}.json")
            return "pruned" if job.get("status") == "pruned" else noted
    return noted


def _seconds(text: str) -> float:
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return 0.0
