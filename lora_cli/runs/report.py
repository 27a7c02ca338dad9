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
    head = {
        "base_model": facts["base"]["name"],
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["lora", task["name"]],
    }
    metrics = [
        f"| {_cell(split)} | {_cell(name)} | {'undefined' if value is None else f'{value:.4f}'} |"
        for split, values in facts["metrics"].items()
        for name, value in values.items()
    ]
    settings = {
        "variant": f"{lora['variant']}, r {lora['r']}, alpha {lora['alpha']:g}, scaling {lora['scaling']}",
        "layers": ", ".join(row["pattern"] for row in facts["targets"]) or "none: only the head is trained",
        "trained parameters": f"{facts['parameters']['trainable']:,} of {facts['parameters']['total']:,}",
        "trained whole": ", ".join(facts["trained_whole"]) or "nothing",
        "training": (
            f"{facts['steps']} steps of {train['batch_size'] * train['accumulation']} rows, "
            f"learning rate {train['lr']:g}, {train['schedule']}, seed {config['seed']}"
        ),
        "labels": ", ".join(facts["labels"]) if facts["labels"] else "a number",
    }
    command = " ".join(["lora train", *overrides])
    lines = [
        "---",
        *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()),
        "---",
        "",
        f"# {_cell(task['name'])} on {_cell(facts['base']['name'])}",
        "",
        f"A low-rank adapter made by lora {facts['versions']['lora']}. It fits this base model only:",
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
        "or with PEFT: load the base model with as many labels, then `PeftModel.from_pretrained(base, folder)`.",
        "",
    ]
    return "\n".join(lines)


def _cell(text: object) -> str:
    """Text that stays inside a Markdown table cell and starts no HTML."""
    return re.sub(r"\s+", " ", str(text)).replace("|", "\\|").replace("<", "&lt;")[:400]
