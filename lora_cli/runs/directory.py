"""A run folder: its name, its files, its status. Files are written whole or not at all; logs grow by whole lines.

    runs/2026-11-22_sst2_minilm_r8_1a2b3c4d/
        config.yaml  overrides.txt  run.json  metrics.jsonl  log.txt  manifest.json
        adapter/  tokenizer/  checkpoints/step-000500/  predictions/validation.jsonl  eval/<split>/

What is read back is data from outside: plain values only, of bounded size, nothing resolved or instantiated.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import math
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import yaml  # type: ignore[import-untyped]

from lora_cli.disk import defused, open_plain, read_object, remove_strays, shown, write_atomic
from lora_cli.errors import RunError, printable
from lora_cli.runs.facts import FORMAT, checked_facts
from lora_cli.spec import SPLITS

__all__ = [
    "FORMAT",
    "RunDirectory",
    "point_latest",
    "read_json",
    "read_saved_config",
    "result_keys",
    "signature",
    "write_csv",
    "write_json",
    "write_jsonl",
]

MAX_CONFIG_BYTES = 1 << 20
_MAX_DEPTH = 20
_LOOKS_S = 0.05
_MAX_EVENTS = 50_000
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where PyYAML was built with it: the one in Python takes minutes for a megabyte."""
_NOT_IN_SIGNATURE = (
    *("tracker.", "sweep.", "resume", "device.threads", "device.name", "device.nproc", "device.shard"),
    *("train.log_every", "train.save_every", "train.keep"),
    # Of the adapter that a run starts from counts what it holds, lora.init_digest.
    *("recipe", "lora.init_from"),
)
"""Keys that change where or how often something is written, not the result."""
_OWN_NAMES = (
    *("config.yaml", "overrides.txt", "run.json", "metrics.jsonl", "log.txt", ".lock"),
    *("adapter", "tokenizer", "checkpoints", "predictions", "eval"),
)
"""What a run folder holds of ours."""
_PATHS = (("model", "path"), ("lora", "init_from"), *(("task", "data", split) for split in SPLITS))
"""Keys that may name a file or folder, as it was typed."""


class RunDirectory:
    """One run's folder. Made by `create`, found by `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / "adapter"
        self.tokenizer = path / "tokenizer"
        self.checkpoints = path / "checkpoints"

    @classmethod
    def create(cls, config: Mapping[str, Any], *, directory: Path | None, overrides: Iterable[str]) -> RunDirectory:
        """Make the folder of a new run and write its config.

        `directory` is the folder the user chose, which must hold no run; None: a name of ours under runs/.

        Raises:
            RunError: `directory` already holds a run, or a file is in the way.
        """
        path = directory if directory is not None else _free_name(Path("runs") / _name(config))
        cls.check_free(path)
        with _explained(path):
            path.mkdir(parents=True, exist_ok=True)
            write_atomic(path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
            write_atomic(path / "overrides.txt", "".join(f"{override}\n" for override in overrides))
        run = cls(path)
        run.update(
            format=FORMAT, status="running", signature=signature(config), started=_now(), started_in=str(Path.cwd())
        )
        return run

    @property
    def is_begun(self) -> bool:
        """Whether the folder is a run's, finished or not, whole or damaged."""
        return (self.path / "run.json").exists()

    @staticmethod
    def check_free(path: Path) -> None:
        """Refuse a folder that cannot become a run's.

        Raises:
            RunError: it holds a run already, or a file is in the way.
        """
        if RunDirectory(path).is_begun:
            raise RunError(f"{path}: holds a run already; choose another hydra.run.dir, or resume=auto to continue it")
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: a file is in the way of the run folder")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from training in this folder; the lock dies with its process.

        Raises:
            RunError: another process holds it.
        """
        with (self.path / ".lock").open("a") as lock:
            try:
                _lock(lock)
            except BlockingIOError:
                raise RunError(f"{self.path}: in use by another process; wait, or choose another folder") from None
            for folder in (self.path, self.checkpoints, self.path / "predictions"):
                remove_strays(folder)
            yield

    @property
    def is_held(self) -> bool:
        """Whether a process trains in this folder now."""
        try:
            with (self.path / ".lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass  # Nobody ever has.
        return False

    def check_plain(self) -> None:
        """Refuse a run with links in it, which could lead what is read or written anywhere, or with pipes.

        A tracker's own folder is its own affair.

        Raises:
            RunError: names the first one.
        """
        for name in _OWN_NAMES:
            found = [self.path / name]
            for file in found:
                mode = file.lstat().st_mode if os.path.lexists(file) else stat.S_IFREG
                if stat.S_ISDIR(mode):
                    found += sorted(file.iterdir())
                elif not stat.S_ISREG(mode):
                    raise RunError(f"{shown(file)}: not a regular file; links in a run are not followed")

    def update(self, **facts: Any) -> None:
        """Merge `facts` into run.json."""
        known = read_json(self.path / "run.json") if (self.path / "run.json").exists() else {}
        if facts.get("status") == "running":
            known.pop("error", None)
        write_json(self.path / "run.json", known | facts)

    def facts(self) -> dict[str, Any]:
        """run.json.

        Raises:
            RunError: it is missing, damaged, or of a newer version.
        """
        return checked_facts(read_json(self.path / "run.json"), self.path)

    def overrides(self) -> list[str]:
        """The words that made the run."""
        with open_plain(self.path / "overrides.txt", RunError, limit=MAX_CONFIG_BYTES) as file:
            return file.read(MAX_CONFIG_BYTES).decode(errors="replace").splitlines()

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, on disk when this returns."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(_json_line(values))

    def cut_metrics(self, step: int, *, scored: bool = True) -> None:
        """Drop lines after `step`, and a torn last one: the log of a resumed run has no step twice.

        If that step is not `scored` its scoring comes again, so a line of an earlier one is dropped too.
        """
        file = self.path / "metrics.jsonl"
        kept = []
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
            with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
                row = json.loads(line)
                if row["step"] < step or (row["step"] == step and (scored or "train/loss" in row)):
                    kept.append(line + "\n")
        write_atomic(file, "".join(kept))

    def log(self, text: str) -> None:
        """One line with the time in log.txt."""
        with (self.path / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{_now()} {printable(text, 2000)}\n")

    def write_predictions(self, split: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """predictions/<split>.jsonl: one line an example, in the order of the data."""
        write_jsonl(self.path / "predictions" / f"{split}.jsonl", rows)

    def stopped(self, error: BaseException) -> None:
        """Note in run.json and in the log what ended the training before its time."""
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        self.update(status=status, error=f"{type(error).__name__}: {error}".removesuffix(": "))
        self.log(f"stopped: {type(error).__name__}: {error}")

    def died(self, status: str, error: str = "its process is gone") -> None:
        """Note for a process that was killed what it could not; nothing if the run has ended, or goes on."""
        # A damaged folder is none to write to.
        with contextlib.suppress(RunError):
            if self.is_begun and self.facts()["status"] == "running" and not self.is_held:
                self.update(status=status, error=error)

    def finish(self, **facts: Any) -> None:
        """Mark the run finished and let runs/latest point to it."""
        self.update(status="finished", finished=_now(), **facts)
        # A finished run is not to fail over a link: the folder's name stays.
        with contextlib.suppress(OSError):
            point_latest(self.path)


def signature(config: Mapping[str, Any]) -> str:
    """Eight hex digits of the keys that change results: equal for equal experiments."""
    return hashlib.sha256(json.dumps(result_keys(config), sort_keys=True).encode()).hexdigest()[:8]


def result_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config that change results, by dotted name."""
    return {key: value for key, value in _flatten(config) if not key.startswith(_NOT_IN_SIGNATURE)}


def read_saved_config(path: Path) -> dict[str, Any]:
    """config.yaml of the run at `path` as plain dicts; {} for a bare adapter folder.

    A relative path in it that leads nowhere from here is taken from where the run was started.

    Raises:
        RunError: too large, no mapping, or holds an alias, a tag, an interpolation or an instantiation key.
    """
    file = path / "config.yaml"
    if not file.exists():
        return {}
    with open_plain(file, RunError, limit=MAX_CONFIG_BYTES) as handle:
        data = handle.read(MAX_CONFIG_BYTES)
    try:
        text = data.decode()
        depth = 0
        for number, event in enumerate(yaml.parse(text, Loader=_LOADER)):
            if number > _MAX_EVENTS:
                raise RunError(f"{file}: not readable: more than {_MAX_EVENTS:,} keys and values")
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
                raise RunError(f"{file}: YAML aliases and tags are not allowed in a run's config")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise RunError(f"{file}: not readable: nested more than {_MAX_DEPTH} deep")
        config = yaml.load(text, Loader=_LOADER)
    except UnicodeDecodeError as error:
        raise RunError(f"{file}: not UTF-8 text (byte {error.start})") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RunError(f"{file}: not readable as YAML ({printable(str(error).splitlines()[0], 80)})") from error
    if not isinstance(config, dict):
        raise RunError(f"{file}: holds no mapping of keys")
    for key, value in _flatten(config):
        if any(part.startswith("_") for part in key.split(".")):
            raise RunError(f"{file}: key {printable(key)} is not allowed in a run's config")
        if isinstance(value, str) and "${" in value:
            raise RunError(f"{file}: {printable(key)} holds an interpolation, which a run's config may not")
    # Somebody else's run may name a model whose repository holds code; running it is only ever typed by hand.
    if isinstance(config.get("model"), dict):
        config["model"]["trust_remote_code"] = False
    if (path / "run.json").exists():
        _find_paths(config, RunDirectory(path).facts().get("started_in", ""))
    return config


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of bounded size from a regular file inside a run.

    Raises:
        RunError: missing, not a regular file, too large, or no JSON object.
    """
    return read_object(file, RunError, limit=64 * MAX_CONFIG_BYTES)


def write_json(file: Path, value: Any) -> None:
    """Write `value` as JSON, atomically; numbers that JSON has not (NaN) become null."""
    write_atomic(file, json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")


def write_jsonl(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    write_atomic(file, "".join(map(_json_line, rows)))


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a line a row, atomically, under the names of all of them; a spreadsheet takes no cell for a formula."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: defused(value) for name, value in row.items()} for row in rows)
    write_atomic(file, text.getvalue())


def point_latest(path: Path) -> None:
    """Let runs/latest lead to `path`, wherever under runs/ it lies."""
    root = Path("runs")
    if root.resolve() not in path.resolve().parents:
        return
    temporary = root / f".latest.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.resolve().relative_to(root.resolve()), target_is_directory=True)
    temporary.replace(root / "latest")


def _lock(file: IO[str]) -> None:
    """Lock a file for this process alone.

    Raises:
        BlockingIOError: another process has it.
    """
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    # It may have been somebody who only looked, see `is_held`.
    time.sleep(_LOOKS_S)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _name(config: Mapping[str, Any]) -> str:
    lora = config["lora"]
    size = f"r{lora['r']}" if lora["targets"] else "head"
    variant = "" if lora["variant"] == "lora" else f"_{lora['variant']}"
    if lora["variant"] == "full":
        size, variant = "full", ""
    model = Path(config["model"]["path"]).name if config["model"]["path"] else config["model"]["name"]
    parts = [time.strftime("%Y-%m-%d"), config["task"]["name"], model, f"{size}{variant}", signature(config)]
    return "_".join(re.sub(r"[^A-Za-z0-9.-]+", "-", part) if i else part for i, part in enumerate(parts))


def _free_name(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that is free: a run is never written over another."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _find_paths(config: dict[str, Any], started_in: str) -> None:
    """Put `started_in` before each relative path in `config` that leads somewhere only from there."""
    for *groups, key in _PATHS:
        node: Any = config
        for group in groups:
            node = node.get(group) if isinstance(node, dict) else None
        if isinstance(node, dict) and isinstance(typed := node.get(key), str):
            with contextlib.suppress(OSError, ValueError):
                there = Path(started_in, typed)
                if not Path(typed).exists() and there.exists():
                    node[key] = str(there)


def _flatten(node: object, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flatten(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list) and any(isinstance(item, dict | list) for item in node):
        for number, item in enumerate(node):
            yield from _flatten(item, f"{path}.{number}")
    else:
        yield path, node


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        raise RunError(f"{path}: a file is in the way of the run folder") from None
    except PermissionError:
        raise RunError(f"{path}: may not be written; choose another hydra.run.dir") from None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(_finite(row), ensure_ascii=False) + "\n"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
