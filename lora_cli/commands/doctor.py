"""lora doctor: the environment in, a table out of what works, what is not there and how to mend it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from lora_cli.errors import TrainingFailure, printable
from lora_cli.health import NOTE, OK, PROBLEM, Finding, examine
from lora_cli.screen import Screen
from lora_cli.spec import DoctorRun

__all__ = ["run"]

_COLOURS = {OK: "green", NOTE: "yellow", PROBLEM: "bold red"}


def run(spec: DoctorRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> None:
    """Print what is found; nothing is written, so `directory` has no meaning here.

    Raises:
        TrainingFailure: as things are nothing can be trained.
    """
    screen, findings = Screen(), list(examine())
    if spec.json:
        for finding in findings:
            print(json.dumps(dataclasses.asdict(finding)))
    else:
        screen.show(_table(findings))
    if stopping := [finding for finding in findings if finding.stops_training]:
        first = stopping[0]
        raise TrainingFailure(f"nothing can be trained here: {first.name}: {first.text}; to mend it: {first.mend}")


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for each in findings:
        mend = f"\n[bold]{escape(printable(each.mend))}[/]" if each.mend else ""
        state = f"[{_COLOURS[each.state]}]{each.state}[/]"
        table.add_row(state, escape(each.name), escape(printable(each.text, 400)) + mend)
    return table
