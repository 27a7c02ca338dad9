"""`lora` command lines in processes of their own that start in milliseconds: forks of one that has done the imports.

That process runs nothing else, so what forks from it has no threads, no locks and no state of a command, and what ends
or kills one of them costs nobody else anything.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from lora_cli.disk import open_plain
from lora_cli.errors import UserError, printable

__all__ = ["forks", "last_line", "obey", "settle", "spawned", "start", "start_logged"]

_TAIL_BYTES = 4096


def start(
    work: Callable[..., None],
    *arguments: object,
    streams: Sequence[Path],
    environ: Mapping[str, str] | None = None,
) -> BaseProcess:
    """`work`, such as `obey`, in a new process, in a session of its own: Ctrl-C in the terminal does not reach it.

    Its standard input, output and error are the files `streams`; the last two are appended to. `environ` is added to
    the environment.
    """
    # As a process that is started afresh would: the folder and environment of whoever forks are those of its own start.
    here = (Path.cwd(), {**os.environ, **(environ or {})})
    process = forks().Process(target=_become, args=(work, arguments, streams, *here))
    process.start()
    return process


def start_logged(
    verb: str, words: Sequence[str], output: Path, *, environ: Mapping[str, str] | None = None
) -> BaseProcess:
    """`lora VERB WORDS` as `start` has it; the words, and then what it says, are added to the file `output`."""
    with output.open("a", encoding="utf-8") as file:
        file.write(f"$ lora {verb} {shlex.join(words)}\n")
    return start(obey, [verb, *words], streams=[Path(os.devnull), output, output], environ=environ)


def last_line(output: Path) -> str:
    """The last line that a command has said to `output` so far; "" if none can be read."""
    with suppress(UserError, OSError), open_plain(output, UserError) as file:
        file.seek(max(0, output.stat().st_size - _TAIL_BYTES))
        return printable(file.read(_TAIL_BYTES).decode(errors="replace").strip().rpartition("\n")[2], 250)
    return ""


def forks() -> ForkServerContext:
    """Makes processes that are forked after the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_cli.preload"])
    return context


def spawned(work: Callable[..., None], *given: Any) -> int | None:
    """Do `work` in a process that starts by itself and is waited for; returns its exit code."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=given)
    process.start()
    try:
        process.join()
    except BaseException:
        process.terminate()
        process.join()
        raise
    return process.exitcode


def settle(streams: Sequence[Path], cwd: Path, environ: Mapping[str, str]) -> None:
    """Give this process, just forked, what `start` says a new one has."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    for number, file in enumerate(streams):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY, 0o644), number)
    # multiprocessing has closed the one there was.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115


def obey(words: Sequence[str]) -> None:
    """Be `lora WORDS` from here on: this process ends with the command."""
    sys.argv = ["lora", *words]
    # Whoever forks may have been started as that module, of which runpy warns.
    sys.modules.pop("lora_cli.__main__", None)
    runpy.run_module("lora_cli", run_name="__main__", alter_sys=True)


def _become(
    work: Callable[..., None],
    arguments: Sequence[object],
    streams: Sequence[Path],
    cwd: Path,
    environ: Mapping[str, str],
) -> None:
    settle(streams, cwd, environ)
    work(*arguments)
