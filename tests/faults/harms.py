"""What is done to a process before it runs a command: it is killed, or its disk or its memory is too small."""

from __future__ import annotations

import codecs
import errno
import os
import resource
import signal
from pathlib import Path
from typing import Any

__all__ = ["die_in_save", "have_little_memory", "lose_rights", "write_small_files"]


def die_in_save(number: int) -> None:
    """kill -9 in front of the `number`-th step of writing checkpoints to disk: a sync, or a rename."""
    done = 0

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += "step-" in _path_of(args[0])
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.fsync = counted(os.fsync)
    Path.rename = counted(Path.rename)  # type: ignore[method-assign]


def write_small_files(most: int) -> None:
    """No file may have more than so many bytes: EFBIG."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def fail_to_sync() -> None:
    """The first checkpoint meets a broken disk: EIO."""
    fsync = os.fsync

    def broken(handle: int) -> None:
        if "step-" in _path_of(handle):
            raise OSError(errno.EIO, os.strerror(errno.EIO), _path_of(handle))
        fsync(handle)

    os.fsync = broken


def lose_rights() -> None:
    """Be an ordinary user, for whom a read-only folder is one."""
    # Python itself may be where such a user may not look, and this much of it comes as late as it is used.
    codecs.lookup("unicode_escape")
    if os.geteuid() == 0:
        os.setuid(65534)


def have_little_memory(more_mib: int) -> None:
    """The process may take so much more memory than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + (more_mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _path_of(what: Any) -> str:
    return str(Path(f"/proc/self/fd/{what}").readlink()) if isinstance(what, int) else str(what)
