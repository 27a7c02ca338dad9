"""What a command owes the system it runs in: the end by a signal, pipes whose reader leaves, warnings in one line."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from lora_cli.errors import printable

__all__ = ["Terminated", "outlive_readers", "signals_and_warnings"]


class Terminated(KeyboardInterrupt):
    """SIGTERM: a scheduler ends the command as Ctrl-C would."""


@contextlib.contextmanager
def signals_and_warnings(name: str) -> Iterator[None]:
    """Within the block SIGTERM raises Terminated, and a warning is one line that begins with `name`."""
    line = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"{name}: warning: {printable(message, 400)}\n"
    # Only the main thread may; elsewhere somebody else's program handles its signals itself.
    handler = _on_sigterm(_terminate) if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    finally:
        warnings.formatwarning = line
        if handler is not None:
            _on_sigterm(handler)


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


def _on_sigterm(handler: Any) -> Any:
    return signal.signal(signal.SIGTERM, handler)


def _terminate(number: int, frame: object) -> None:
    raise Terminated
