"""The command line in a process of its own that starts in milliseconds, as `lora compare` starts trainings.

A fresh interpreter takes four seconds of processor time to import what most commands need. A forked one does the same
in its own current directory, with its own streams and exit code. That every command also starts afresh is tested once
for each.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory

from lora_cli import isolation

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
    environ = {**os.environ, "COLUMNS": "120"}
    with TemporaryDirectory() as name:
        streams = [Path(name) / stream for stream in ("in", "out", "err")]
        for stream, text in zip(streams, (stdin, "", ""), strict=True):
            stream.write_text(text, encoding="utf-8")
        process = isolation.forks().Process(target=_harmed, args=(harm, words, streams, cwd, environ))
        process.start()
        process.join(SECONDS if kill_after_s is None else kill_after_s)
        if process.exitcode is None:
            process.kill()
            process.join()
        if process.exitcode == -signal.SIGKILL and harm is None and kill_after_s is None:
            raise subprocess.TimeoutExpired(list(words), SECONDS)
        _, out, err = (stream.read_text(encoding="utf-8") for stream in streams)
    return subprocess.CompletedProcess(list(words), process.exitcode, out, err)


class Started:
    """`lora WORDS` that runs in the folder `cwd` while a test does something to it, as subprocess.Popen has it."""

    def __init__(self, words: Sequence[str], cwd: Path, harm: Callable[[], object] | None = None) -> None:
        self._folder = TemporaryDirectory()
        self._streams = [Path(self._folder.name) / stream for stream in ("in", "out", "err")]
        for stream in self._streams:
            stream.touch()
        environ = {**os.environ, "COLUMNS": "120"}
        self._process = isolation.forks().Process(target=_harmed, args=(harm, words, self._streams, cwd, environ))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    @property
    def said(self) -> str:
        """What it has written to stdout so far."""
        return self._streams[1].read_text(encoding="utf-8")

    def send_signal(self, number: signal.Signals) -> None:
        """Nothing happens if it has ended."""
        if self._process.exitcode is None:
            os.kill(self._process.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end: what it has written to stdout and stderr."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired("lora", timeout)
        _, out, err = (stream.read_text(encoding="utf-8") for stream in self._streams)
        self._folder.cleanup()
        return out, err


def _harmed(
    harm: Callable[[], object] | None,
    words: Sequence[str],
    streams: Sequence[Path],
    cwd: Path,
    environ: Mapping[str, str],
) -> None:
    isolation.settle(streams, cwd, environ)
    _share_the_server()
    if harm is not None:
        harm()
    isolation.obey(words)


def _share_the_server() -> None:
    """Let what this process starts be forked where it was itself: a server of its own would do all imports again."""
    # Its address and the pipe that keeps it alive are inherited; it only may not wait for a process that is no child.
    forkserver._forkserver.ensure_running = lambda: None
