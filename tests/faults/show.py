"""Run the tests of the fault table, and all slow ones, and print it: python -m faults.show [arguments of pytest].

The exit code is 1 if one of them fails or is not there.
"""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from faults.matrix import MATRIX, Row

__all__ = ["main", "verdict_of"]

ROOT = Path(__file__).parents[2]


def verdict_of(row: Row, done: Mapping[str, str]) -> str:
    """What came of a row's tests; `done`: test → passed, failed or why it was skipped."""
    passed = 0
    for test in row.tests:
        found = {name: how for name, how in done.items() if name == test or name.startswith(_beginning(test))}
        if not found:
            return f"not run: {test}"
        for name, how in found.items():
            if how == "failed":
                return f"FAILED {name}"
            if how != "passed":
                return f"skipped: {how}"
        passed += len(found)
    return "; ".join(filter(None, [f"{passed} passed" if passed else "", row.instead]))


def main(words: list[str]) -> int:
    """Run, print, and say by the exit code whether all is well."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["--faults", f"--junitxml={report}", "-o", "junit_family=xunit1", *words]
        code = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT, check=False).returncode
        cases = list(ElementTree.parse(report).iter("testcase"))
    done = {f"{case.get('file')}::{case.get('name')}": _how(case) for case in cases}
    console = Console(width=140)
    table = Table("row", "case", "result", box=None, padding=(0, 2, 0, 0))
    verdicts = [verdict_of(row, done) for row in MATRIX]
    for row, verdict in zip(MATRIX, verdicts, strict=True):
        table.add_row(str(row.number), escape(row.case), escape(verdict))
    console.print(table)
    console.print(_costs(cases))
    for said in (each.get("value") for case in cases for each in case.iter("property") if each.get("name") == "chaos"):
        console.print(f"chaos: {said}")
    return 1 if code or any(verdict.startswith(("FAILED", "not run")) for verdict in verdicts) else 0


def _beginning(test: str) -> str:
    return test if "[" in test else f"{test}["


def _how(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    skipped = case.find("skipped")
    return "passed" if skipped is None else str(skipped.get("message"))


def _costs(cases: list[ElementTree.Element]) -> Table:
    """What hostile files cost, as their tests recorded it."""
    table = Table("hostile file", "ms", "MiB", box=None, padding=(0, 2, 0, 0))
    for case in cases:
        noted = {each.get("name"): str(each.get("value")) for each in case.iter("property")}
        if "wall_ms" in noted:
            table.add_row(escape(str(case.get("name")).partition("[")[2][:-1]), noted["wall_ms"], noted["peak_mib"])
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
