"""Processes to be measured, and what they ran on. Knows nothing of what they do."""

from __future__ import annotations

import datetime
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["STARTED", "measure", "surroundings"]

STARTED = "LORA_BENCH_STARTED"
"""Environment variable of a measured process: time.monotonic() when it was started."""
PACKAGES = ("lora-cli", "torch", "transformers", "peft", "accelerate", "loralib")


def measure(words: Sequence[str], scratch: Path, threads: int) -> tuple[float, float]:
    """Run Python with `words` in `scratch`: (wall time in s, peak resident set in MiB).

    Raises:
        SystemExit: it failed; carries the end of what it said.
    """
    environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if root := os.environ.get("LORA_HUB_ROOT"):
        environment["LORA_HUB_ROOT"] = str(Path(root).resolve())
    log, started = scratch / "log.txt", time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=scratch,
            env={**os.environ, **environment, STARTED: str(started)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        with _ending(process):
            # wait4 tells the memory of this child alone; getrusage would give the largest of all so far.
            _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.monotonic() - started
    if process.returncode:
        end = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise SystemExit(f"{end}\nexit code {process.returncode}: python {' '.join(words)}")
    return wall_s, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**20


@contextmanager
def _ending(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Within it, who is interrupted or told to end takes `process` along, and leaves nothing that is busy behind."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def surroundings() -> dict[str, Any]:
    """When, where and with which libraries something was measured."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    }
