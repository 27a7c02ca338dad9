"""Commands in processes that are forked after the imports."""

from __future__ import annotations

import importlib
from pathlib import Path

from lora_cli import isolation


def _obey_as_a_fork_of_the_command_line() -> None:
    """As whoever was started by `python -m lora_cli` forks, with that module imported."""
    importlib.import_module("lora_cli.__main__")
    isolation.obey(["--version"])


def test_a_command_says_nothing_but_its_own(scratch: Path) -> None:
    said = scratch / "said.txt"
    streams = [Path("/dev/null"), said, said]
    process = isolation.start(_obey_as_a_fork_of_the_command_line, streams=streams)
    process.join()
    (line,) = said.read_text().splitlines()
    assert line.startswith("lora ")
