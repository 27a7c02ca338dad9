"""The digests of a finished run's files, and whether the files still are what they were. Knows bytes only."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_cli.disk import sha256
from lora_cli.errors import RunError, printable
from lora_cli.runs.directory import read_json, write_json

__all__ = ["NOT_COVERED", "changed_files", "check_model_files", "harmful", "write_manifest"]

_NAME = "manifest.json"
_MODEL_FOLDERS = ("adapter/", "tokenizer/")
_FILES = ("config.yaml", "overrides.txt", "run.json", "metrics.jsonl", "log.txt")
_FOLDERS = ("adapter", "tokenizer", "predictions")
NOT_COVERED = "checkpoints (a manifest each), eval, records of trackers"
"""What lies in a run folder and may come or change after its end."""


def write_manifest(run: Path) -> None:
    """Write manifest.json: the SHA-256 of each file that a finished run is not to change any more."""
    write_json(run / _NAME, {name: sha256(run / name, RunError) for name in _covered(run)})


def changed_files(run: Path) -> list[str]:
    """What is not as the manifest says, each with a word: changed, missing, new.

    Raises:
        RunError: there is no manifest, or it is none.
    """
    if not (run / _NAME).exists():
        raise RunError(f"{run}: has no {_NAME}; the run was made by an earlier version, or cut short at its very end")
    return _changed(run, "")


def harmful(changed: Sequence[str]) -> list[str]:
    """Of what `changed_files` says, what is wrong with the results: a model card that somebody has worked on, and files
    of their own beside ours, are welcome.
    """
    return [each for each in changed if not each.endswith((" new", ".md changed", ".md missing"))]


def check_model_files(run: Path) -> None:
    """Refuse a run whose adapter or tokenizer is not as its manifest says, if it has one.

    Raises:
        RunError: names the first file.
    """
    changed = _changed(run, _MODEL_FOLDERS) if (run / _NAME).exists() else []
    if damaged := harmful(changed):
        raise RunError(f"{run}: {damaged[0]} since the run ended ({_NAME}); lora verify run={run} compares all")


def _changed(run: Path, folders: str | tuple[str, ...]) -> list[str]:
    digests = {name: digest for name, digest in read_json(run / _NAME).items() if name.startswith(folders)}
    for name, digest in digests.items():
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise RunError(f"{run / _NAME}: no digest of {printable(name, 60)}")
    there = {name for name in _covered(run) if name.startswith(folders)}
    found = {name: "missing" for name in digests if name not in there} | dict.fromkeys(there - set(digests), "new")
    found |= {name: "changed" for name in there & set(digests) if sha256(run / name, RunError) != digests[name]}
    return [f"{name} {what}" for name, what in sorted(found.items())]


def _covered(run: Path) -> Iterator[str]:
    """Files by name, in the manifest's order; only what lies in the run itself."""
    for name in _FILES:
        if (run / name).exists():
            yield name
    for folder in _FOLDERS:
        for file in sorted((run / folder).glob("*")):
            if not stat.S_ISDIR(file.lstat().st_mode):
                yield file.relative_to(run).as_posix()
