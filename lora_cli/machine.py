"""The machine as its operating system tells it: processors, memory, disks, a compiler. Knows nothing of torch."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Memory", "compiler", "free_disk", "memory", "processors"]

_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
"""Files of a control group that tell how much memory it may have, of version 2 and of version 1."""
_UNLIMITED = 2**60
"""Version 1 writes a number above this for no limit."""


@dataclass(frozen=True)
class Memory:
    """Bytes of main memory that a process may have."""

    total: int
    available: int
    """Without what other processes hold."""


def processors() -> int:
    """Processors that this process may use: a container or taskset may allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory(root: Path = Path("/")) -> Memory:
    """Main memory; `root` is where /proc and /sys lie."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = total
    # Not on macOS, which has no such file and counts otherwise.
    with suppress(OSError):
        lines = (line.split() for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines())
        table = {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines}
        total, available = table["MemTotal"], table["MemAvailable"]
    limit = _limit(root / "sys/fs/cgroup")
    return Memory(min(total, limit), min(available, limit))


def free_disk(folder: Path) -> tuple[Path, int]:
    """The nearest folder at or above `folder` that exists, and the bytes that may still be written there."""
    here = folder.absolute()
    there = next(path for path in (here, *here.parents) if path.is_dir())
    return there, shutil.disk_usage(there).free


def compiler() -> str | None:
    """The C++ compiler that torch.compile would call; None: there is none."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _limit(group: Path) -> int:
    for name in _LIMITS:
        with suppress(OSError, ValueError):
            limit = int((group / name).read_text(encoding="ascii"))
            if limit < _UNLIMITED:
                return limit
    return _UNLIMITED
