"""Files and folders written whole or not at all, and JSON of bounded size read back. Knows no file by name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lora_cli.errors import UserError, printable

__all__ = [
    "atomic_file",
    "atomic_folder",
    "defused",
    "open_plain",
    "parse_object",
    "read_object",
    "remove_strays",
    "sha256",
    "shown",
    "unless_empty",
    "write_atomic",
]

_MAX_SHOWN = 90
_STRAY = re.compile(r"\..+\.\d+\.(tmp|old)")
"""Names of what is not complete: the target's, and the number of the process that wrote it."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\0")
"""First characters that make a spreadsheet run a cell as a formula (OWASP, CWE-1236)."""


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A path to write to, whose file becomes `target` when the block ends well, and vanishes otherwise.

    `target` is, at any moment, the old file or the new one, whole.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(target)  # The name that a person knows.
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and vanishes otherwise.

    A folder already there is replaced, as a whole.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        old = temporary.with_suffix(".old")
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def unless_empty(folder: Path | None, *, besides: str) -> Iterator[None]:
    """Take `folder` away if the block made it and left no file in it `besides` one name, and its parent if empty."""
    new = folder is not None and not folder.exists()
    try:
        yield
    finally:
        if folder and new and {file.name for file in folder.rglob("*") if not file.is_dir()} == {besides}:
            shutil.rmtree(folder)
            with contextlib.suppress(OSError):
                folder.parent.rmdir()


def write_atomic(file: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_object(file: Path, error: type[UserError], *, limit: int) -> dict[str, Any]:
    """The JSON object in a regular file of at most `limit` bytes; NaN, Infinity and repeated keys are refused.

    Raises:
        UserError: as `error`: it is missing, no regular file, too large, or no JSON object.
    """
    with open_plain(file, error, limit=limit) as handle:
        return parse_object(handle.read(limit), file, error)


def parse_object(data: bytes, file: Path, error: type[UserError]) -> dict[str, Any]:
    """The JSON object that `data`, read from `file`, stands for; NaN, Infinity and repeated keys are refused.

    Raises:
        UserError: as `error`: it is something else.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as fault:
        reason = "nested too deep" if isinstance(fault, RecursionError) else printable(fault, 80)
        raise error(f"{shown(file)}: not readable as JSON ({reason})") from fault
    if not isinstance(value, dict):
        raise error(f"{shown(file)}: a JSON object is needed, not a {type(value).__name__}")
    return value


def open_plain(file: Path, error: type[UserError], *, limit: int | None = None) -> BinaryIO:
    """Open a regular file of at most `limit` bytes; a link could lead anywhere and a fifo would wait for ever.

    Raises:
        UserError: as `error`: it is missing, too large, or something else.
    """
    try:
        info = file.lstat()
        if not stat.S_ISREG(info.st_mode):
            raise error(f"{shown(file)}: not a regular file (links are not followed); copy the file itself")
        if limit is not None and info.st_size > limit:
            raise error(f"{shown(file)}: {info.st_size:,} bytes; at most {limit:,} are read")
        return os.fdopen(os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)), "rb")
    except OSError as fault:
        raise error(f"{shown(file)}: {fault.strerror or fault}") from fault


def sha256(file: Path, error: type[UserError]) -> str:
    """The SHA-256 of a regular file's bytes, in hex digits.

    Raises:
        UserError: as `error`, see `open_plain`.
    """
    digest = hashlib.sha256()
    with open_plain(file, error) as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def remove_strays(folder: Path) -> None:
    """Take away what writers that were killed have left in `folder`: unfinished files and folders without a name."""
    for stray in [file for file in folder.glob(".*") if _STRAY.fullmatch(file.name)]:
        if stray.is_dir() and not stray.is_symlink():
            shutil.rmtree(stray)
        else:
            stray.unlink()


def defused(cell: Any) -> Any:
    """`cell` for a CSV file: a text that a spreadsheet would run as a formula begins with a quote, others stay."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def shown(path: str | Path) -> str:
    """`path` for a message: safe on a terminal, and of a long one the end."""
    text = printable(path, 1000)
    return text if len(text) <= _MAX_SHOWN else f"…{text[1 - _MAX_SHOWN :]}"


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def _sync(path: Path) -> None:
    """Have a file's content, or a folder's list of names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is there twice")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
