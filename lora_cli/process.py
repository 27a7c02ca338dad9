"""What a command owes the system it runs in: a quick start and end, the end by a signal, pipes whose reader leaves,
warnings in one line.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO, TypeVar

from lora_cli.errors import printable

__all__ = [
    "GentleStop",
    "Terminated",
    "gentle_stop",
    "hurry",
    "leave",
    "outlive_readers",
    "say_anything",
    "settle_down",
    "signals_and_warnings",
]

T = TypeVar("T")
_SELDOM = (1_000_000, 50, 1000)
"""Thresholds of the garbage collector while a command starts."""
_usual: list[tuple[int, int, int]] = []
"""Those before, in a command that starts."""
_TERMINATING = (signal.SIGTERM, signal.SIGUSR1)
_ECHO_S = 0.1
"""A scheduler signals the process and its group: one that comes so soon after the first is the same one."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, or SIGUSR1, with which SLURM announces it: a scheduler ends the command as Ctrl-C would."""


class _Left(KeyboardInterrupt):
    """A piece of work is left because a stop is asked for."""


class GentleStop:
    """A signal that waits until there is a good moment to stop; a second one does not wait. See `gentle_stop`."""

    def __init__(self) -> None:
        self._asked: type[KeyboardInterrupt] | None = None
        self._asked_at = 0.0
        self._leaves = False

    @property
    def is_asked(self) -> bool:
        """Whether a signal has come."""
        return self._asked is not None

    def unless_asked(self, work: Callable[[], T]) -> T | None:
        """What `work` returns. None if a signal has come before or comes meanwhile: then `work` is left where it is."""
        if self.is_asked:
            return None
        try:
            self._leaves = True
            result = work()
            self._leaves = False
        except _Left:
            return None
        finally:
            self._leaves = False
        return result

    def take_effect(self) -> None:
        """Raise what the signal that has come would have raised at once, if any."""
        if self._asked is not None:
            raise self._asked

    def heed(self, number: int, frame: object) -> None:
        """Note a signal, or raise if it is the second."""
        now = time.monotonic()
        if self._asked is None:
            self._asked, self._asked_at = _raised_by(number), now
            if self._leaves:
                raise _Left
        elif now - self._asked_at > _ECHO_S:
            raise _raised_by(number)


@contextlib.contextmanager
def gentle_stop() -> Iterator[GentleStop]:
    """Within the block the first signal that would end the command waits, at the latest for the end of the block."""
    stop = GentleStop()
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, *_TERMINATING):
            # One that is ignored (nohup, a job in the background) stays so.
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, stop.heed)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    stop.take_effect()


@contextlib.contextmanager
def signals_and_warnings(name: str) -> Iterator[None]:
    """Within the block SIGTERM and SIGUSR1 raise Terminated, and a warning is one line that begins with `name`."""
    line = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"{name}: warning: {printable(message, 400)}\n"
    # Only the main thread may; elsewhere somebody else's program handles its signals itself.
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.signal(number, _terminate) for number in _TERMINATING if in_main}
    try:
        yield
    finally:
        warnings.formatwarning = line
        for number, handler in handlers.items():
            signal.signal(number, handler)


def hurry() -> None:
    """Until `settle_down`, hardly look for garbage: imports make half a million objects that stay, and going through
    them again and again took a sixth of a command's start.
    """
    _usual.append(gc.get_threshold())
    gc.set_threshold(*_SELDOM)


def settle_down() -> None:
    """After `hurry`, once what stays is there: look for garbage as usual, but not among that any more."""
    if _usual:
        gc.freeze()
        gc.set_threshold(*_usual.pop())


def leave(code: int) -> NoReturn:
    """End the process at once: taking apart what a million objects refer to takes more than a second.

    What was registered for the end is done, and what was written is written.
    """
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        raise SystemExit(code)  # It waits for them.
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BrokenPipeError:
        pass  # As Python's own end would complain.
    os._exit(code)


def say_anything() -> None:
    """Let the process write what its terminal's encoding lacks (LANG=C) as escapes, as Python itself complains."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream in (sys.__stdout__, sys.__stderr__):
            stream.reconfigure(errors="backslashreplace")


def outlive_readers(*names: str) -> None:
    """From now on what is written to these streams of sys, once their reader went away (`| head`), is dropped."""
    for name in names:
        stream: TextIO = getattr(sys, name)
        # Only the process's own: what a program has put in their place is its own affair.
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            raw = io.BufferedWriter(_Patient(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True))


class _Patient(io.FileIO):
    """A pipe that swallows what nobody reads."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def _raised_by(number: int) -> type[KeyboardInterrupt]:
    return Terminated if number in _TERMINATING else KeyboardInterrupt


def _terminate(number: int, frame: object) -> None:
    raise Terminated
