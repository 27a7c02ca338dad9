"""A run as an HTML page: what was reached, what it cost, how it came about, how to get it again."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from lora_cli import page
from lora_cli.comparison_view import seconds, size
from lora_cli.errors import RunError
from lora_cli.page import Html
from lora_cli.runs.difference import read_metrics, series
from lora_cli.runs.directory import RunDirectory, read_saved_config, result_keys
from lora_cli.runs.predictions import read_predictions
from lora_cli.screen import count, significant
from lora_cli.xy_plot import xy_plot

__all__ = ["curves", "run_page"]

_MAX_LABELS = 30
"""Rows of a confusion matrix that can be read."""


def run_page(run: RunDirectory, examples: int) -> str:
    """The page of one run, finished or not.

    Raises:
        RunError: it is damaged.
    """
    facts, config = run.facts(), read_saved_config(run.path)
    title = f"{config['task']['name']} with {config['model']['name']}"
    parts = [page.paragraph(f"{run.path.name} · {facts['status']} · {facts.get('started', '')}", quiet=True)]
    if facts.get("error"):
        parts.append(page.paragraph(f"It ended early: {facts['error']}"))
    parts.append(_results(facts))
    parts += _curves(run)
    with suppress(RunError):
        parts += _answers(run, config, facts, examples)
    parts += [_trained(facts), _cost(facts), _again(run, facts), _setting(config, facts)]
    return page.document(title, parts)


def _results(facts: Mapping[str, Any]) -> Html:
    rows = [
        (f"{split}/{name}", significant(value, 4))
        for split, metrics in facts.get("metrics", {}).items()
        for name, value in metrics.items()
    ]
    return page.section("Results", page.table(["metric", "value"], rows) if rows else page.paragraph("none yet"))


def curves(run: RunDirectory) -> dict[str, list[tuple[int, float]]]:
    """Losses, and every other figure of the validation split, over the steps of a run; none of what cannot be read."""
    try:
        rows = read_metrics(run.path)
    except RunError:
        return {}
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("validation/"))
    losses = dict.fromkeys(name for row in rows for name in row if name.endswith("/loss"))
    return {name: found for name in {**losses, **names} if (found := series(rows, name))}


def _curves(run: RunDirectory) -> list[Html]:
    found = curves(run)
    losses = {name: points for name, points in found.items() if name.endswith("/loss")}
    parts = [Html(xy_plot(losses, x_label="step", y_label="loss"))] if losses else []
    parts += [
        Html(xy_plot({name: points}, x_label="step", y_label=name))
        for name, points in found.items()
        if name not in losses
    ]
    return [page.section("While it trained", *parts)] if parts else []


def _answers(run: RunDirectory, config: Mapping[str, Any], facts: Mapping[str, Any], examples: int) -> list[Html]:
    split = config["task"]["split"]
    rows = read_predictions(run, split)
    labels = facts.get("labels")
    if labels:
        wrong = [row for row in rows if row.get("label") != row.get("prediction")]
        surest = sorted(wrong, key=lambda row: -_number(row.get("probability")))[:examples]
        cells = [(row.get("index"), row.get("label"), row.get("prediction"), _share(row)) for row in surest]
        parts = [_confusion(rows, labels)] if len(labels) <= _MAX_LABELS else []
        if cells:
            parts.append(page.paragraph(f"{len(wrong):,} of {len(rows):,} are wrong; those it was surest of:"))
            parts.append(page.table(["row", "label", "prediction", "probability"], cells, numbers=False))
        return [page.section(f"Predictions, {split}", *parts)]
    if config["task"]["kind"] == "classification":
        values = [(_number(row.get("label")), _number(row.get("prediction"))) for row in rows]
        plot = xy_plot({"rows": values}, x_label="label", y_label="prediction", dots=True)
        return [page.section(f"Predictions, {split}", Html(plot))]
    names = [name for name in rows[0] if name != "index"]
    texts = [[_joined(row.get(name)) for name in ("index", *names)] for row in rows[:examples]]
    return [page.section(f"Written texts, {split}", page.table(["row", *names], texts, numbers=False))]


def _confusion(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Html:
    counts = Counter((row.get("label"), row.get("prediction")) for row in rows)
    table = []
    for label in labels:
        total = sum(counts[label, said] for said in labels)
        cells = [(str(counts[label, said] or ""), counts[label, said] / max(total, 1)) for said in labels]
        table.append((label, cells))
    return page.heat_map(["label \\ prediction", *labels], table)


def _trained(facts: Mapping[str, Any]) -> Html:
    rows = [(row["pattern"], row["layers"], f"{row['parameters']:,}") for row in facts.get("targets", [])]
    rows += [(f"{name} (whole)", 1, "") for name in facts.get("trained_whole", [])]
    counts = facts.get("parameters", {})
    share = page.paragraph("")
    if counts.get("total"):
        trainable, total = counts["trainable"], counts["total"]
        share = page.paragraph(f"{trainable:,} of {total:,} parameters train: {trainable / total:.2%}.")
    return page.section("What was trained", share, page.table(["layers", "how many", "parameters"], rows))


def _cost(facts: Mapping[str, Any]) -> Html:
    cost = facts.get("cost", {})
    shown = [
        ("training", seconds(cost["train_s"]) if "train_s" in cost else None),
        ("in all", seconds(cost["wall_s"]) if "wall_s" in cost else None),
        *((f"{name}/s", count(cost[f"{name}_per_s"])) for name in ("rows", "tokens") if f"{name}_per_s" in cost),
        ("peak memory", size(cost["peak_memory_mib"] * 2**20) if "peak_memory_mib" in cost else None),
        ("foretold", _foretold(facts["forecast"]) if "forecast" in facts else None),
        ("shared by", f"{facts['fused']} trainings on one base model" if "fused" in facts else None),
        ("device", facts.get("device")),
    ]
    return page.section("What it cost", page.facts((name, value) for name, value in shown if value is not None))


def _foretold(forecast: Mapping[str, float]) -> str:
    peak, time_s = size(forecast["peak_memory_mib"] * 2**20), seconds(forecast["train_s"])
    return f"training {time_s}, peak memory {peak} (after {forecast['after_steps']:,} of {forecast['steps']:,} steps)"


def _again(run: RunDirectory, facts: Mapping[str, Any]) -> Html:
    """The command for every number."""
    own = shlex.quote(f"run={run.path}")
    lines = [f"lora train {shlex.join(run.overrides())}".strip()]
    for split in facts.get("metrics", {}):
        lines.append(f"lora eval {own} task.split={split}")
    lines += [f"lora verify {own}", f"lora rerun {own}"]
    return page.section("The same numbers again", page.command(*lines))


def _setting(config: Mapping[str, Any], facts: Mapping[str, Any]) -> Html:
    keys = page.facts(result_keys(config).items())
    known = {f"{split}, fingerprint of its rows": each["fingerprint"] for split, each in facts.get("data", {}).items()}
    known["base model, fingerprint"] = facts.get("base", {}).get("fingerprint", "")
    known |= {f"version of {name}": version for name, version in facts.get("versions", {}).items()}
    return page.section(
        "Configuration and environment",
        page.section("every key that changes results", keys, folded=True),
        page.section("data, base model, versions", page.facts(known.items()), folded=True),
    )


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _share(row: Mapping[str, Any]) -> str:
    return significant(row["probability"]) if isinstance(row.get("probability"), int | float) else ""


def _joined(value: object) -> object:
    return " / ".join(map(str, value)) if isinstance(value, list) else value
