"""The command line in a process of its own that starts in milliseconds, as `lora compare` starts trainings.

A fresh interpreter takes four seconds of processor time to import what most commands need. A forked one does the same
in its own current directory, with its own streams and exit code. That every command also starts afresh is tested once
for each.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from lora_cli import isolation

SECONDS = 300


def run(words: Sequence[str], cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """`lora WORDS` in the folder `cwd`."""
    with TemporaryDirectory() as name:
        streams = [Path(name) / stream for stream in ("in", "out", "err")]
        for stream, text in zip(streams, (stdin, "", ""), strict=True):
            stream.write_text(text, encoding="utf-8")
        with patch.dict(os.environ, COLUMNS="120"):
            process = isolation.start(words, streams=streams, cwd=cwd)
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(list(words), SECONDS)
        _, out, err = (stream.read_text(encoding="utf-8") for stream in streams)
    return subprocess.CompletedProcess(list(words), process.exitcode, out, err)
