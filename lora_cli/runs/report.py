"""The adapter's model card: what it is, what it reached, how to use it. Plain Markdown, nothing foreign unescaped."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["model_card"]


def model_card(config: Mapping[str, Any], facts: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """README.md of an adapter, with the metadata block that model hubs read.

    `config` is the run's config, `facts` its run.json, `overrides` the words that were typed.
    """
    task, lora, train = config["task"], config["lora"], config["train"]
    is_full = lora["variant"] == "full"
    made, fits = "A low-rank adapter made", "It fits this base model only"
    if is_full:
        made, fits = "The whole model, fine-tuned", "It was trained from this base model"
    head = {
        "base_model": facts["base"]["name"],
        "library_name": "transformers" if is_full else "peft",
        "pipeline_tag": "text-classification" if task["kind"] == "classification" else "text-generation",
        "tags": [lora["variant"] if is_full else "lora", task["name"]],
    }
    metrics = [
        f"| {_cell(split)} | {_cell(name)} | {'undefined' if value is None else f'{value:.4f}'} |"
        for split, values in facts["metrics"].items()
        for name, value in values.items()
    ]
    settings = {
        "variant": f"{lora['variant']}, r {lora['r']}, alpha {lora['alpha']:g}, scaling {lora['scaling']}, "
        f"init {lora['init']}",
        "layers": ", ".join(row["pattern"] for row in facts["targets"]) or "none: only the head is trained",
        "trained parameters": f"{facts['parameters']['trainable']:,} of {facts['parameters']['total']:,}",
        "trained whole": "everything" if is_full else ", ".join(facts["trained_whole"]) or "nothing",
        "training": (
            f"{facts['steps']} steps of {train['batch_size'] * train['accumulation']} rows, "
            f"learning rate {train['lr']:g}, {train['schedule']}, seed {config['seed']}"
        ),
    }
    if task["kind"] == "classification":
        settings["labels"] = ", ".join(facts["labels"]) if facts["labels"] else "a number"
    if is_full:
        settings = {key: value for key, value in settings.items() if key not in ("variant", "layers")}
    command = " ".join(["lora train", *overrides])
    lines = [
        "---",
        *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()),
        "---",
        "",
        f"# {_cell(task['name'])} on {_cell(facts['base']['name'])}",
        "",
        f"{made} by lora {facts['versions']['lora']}. {fits}:",
        f"fingerprint `{facts['base']['fingerprint'][:16]}`.",
        "",
        "| split | metric | value |",
        "|---|---|---|",
        *metrics,
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {key} | {_cell(value)} |" for key, value in settings.items()),
        "",
        "Made by:",
        "",
        "```",
        command.replace("`", "'"),
        "```",
        "",
        "Use it:",
        "",
        "```",
        'lora infer run=THIS_RUN text="..."',
        "```",
        "",
        "or with transformers: `from_pretrained(folder)` of the Auto class for the task."
        if is_full
        else "or with PEFT: load the base model with as many labels, then `PeftModel.from_pretrained(base, folder)`.",
        "",
    ]
    return "\n".join(lines)


def _cell(text: object) -> str:
    """Text that stays inside a Markdown table cell and starts no HTML."""
    return re.sub(r"\s+", " ", str(text)).replace("|", "\\|").replace("<", "&lt;")[:400]
