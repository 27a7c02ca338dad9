"""The command line in a process of its own that starts in milliseconds, forked from one that has imported torch.

A fresh interpreter takes four seconds of processor time to import what most commands need. A forked one does the same
in its own current directory, with its own streams and exit code. That every command also starts afresh is tested once
for each.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

PRELOADED = [
    "lora_cli.cli",
    "lora_cli.experiment",
    "hydra.main",
    "transformers.models.auto.tokenization_auto",
    *(f"transformers.models.{family}.modeling_{family}" for family in ("bert", "gpt2", "llama", "t5")),
]
SECONDS = 300


def run(
    words: Sequence[str],
    cwd: Path,
    stdin: str = "",
    *,
    harm: Callable[[], object] | None = None,
    kill_after_s: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """`lora WORDS` in the folder `cwd`; `harm` is done to the process first, and kill -9 after some time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with TemporaryDirectory() as name:
        streams = [Path(name) / stream for stream in ("in", "out", "err")]
        for stream, text in zip(streams, (stdin, "", ""), strict=True):
            stream.write_text(text, encoding="utf-8")
        process = context.Process(target=_command, args=(words, cwd, streams, harm))
        process.start()
        process.join(SECONDS if kill_after_s is None else kill_after_s)
        if process.exitcode is None:
            process.kill()
            process.join()
        if process.exitcode == -signal.SIGKILL and harm is None and kill_after_s is None:
            raise subprocess.TimeoutExpired(list(words), SECONDS)
        _, out, err = (stream.read_text(encoding="utf-8") for stream in streams)
    return subprocess.CompletedProcess(list(words), process.exitcode, out, err)


def _command(words: Sequence[str], cwd: Path, streams: Sequence[Path], harm: Callable[[], object] | None) -> None:
    from lora_cli.cli import main

    os.chdir(cwd)
    os.environ["COLUMNS"] = "120"
    for number, stream in enumerate(streams):
        os.dup2(os.open(stream, os.O_RDWR), number)
    # multiprocessing has closed the one there was.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if harm is not None:
        harm()
    sys.exit(main(words))
