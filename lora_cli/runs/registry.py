"""Which run a person means by run=. Knows only names of folders and files."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from lora_cli.errors import RunError, UnknownName
from lora_cli.runs.directory import RunDirectory, read_json, read_saved_config, result_keys, signature

__all__ = ["all_runs", "find_adapter", "find_run", "find_started", "finished_runs", "is_bare_adapter", "run_of"]

_ROOT = Path("runs")


def find_run(name: str) -> Path:
    """The folder meant by a path, a unique prefix of a run's name, `latest`, or an adapter folder.

    Raises:
        RunError: nothing there, or the prefix fits several runs.
        UnknownName: no run has such a name.
    """
    path, latest = Path(name), _ROOT / "latest"
    if (name == "latest" or path == latest) and not latest.exists():
        raise RunError("run=latest: no finished run under runs/ yet; lora train makes one")
    if name == "latest":
        return _from_here(latest)
    if path.is_dir():
        if (path / "jobs").is_dir():
            raise RunError(
                f"run={name}: a sweep; its runs are {path / '0'} and so on, and lora report takes sweep={name}"
            )
        if not (path / "run.json").exists() and not is_bare_adapter(path):
            raise RunError(f"{name}: neither a run (run.json) nor an adapter (adapter_config.json) is in this folder")
        return path
    # A sweep's jobs are named by the sweep and their number, such as 2026-11-22_sweep/3.
    runs = {run.path.relative_to(_ROOT).as_posix(): run.path for run in all_runs()}
    found = [runs[name]] if name in runs else [run for own, run in runs.items() if own.startswith(name)]
    if not found:
        named = ["latest"] if latest.exists() else []
        raise UnknownName("run", name, [*named, *runs, *_beside(path)], "run")
    if len(found) > 1:
        raise RunError(f"run={name}: fits {len(found)} runs: {', '.join(run.name for run in found[:4])}")
    return found[0]


def find_started(name: str) -> RunDirectory:
    """The run that `find_run` finds, but for `latest` the one under runs/ that was started last, finished or not.

    Raises:
        RunError: nothing there, or only an adapter.
        UnknownName: no run has such a name.
    """
    path = _newest() if name == "latest" else find_run(name)
    if is_bare_adapter(path):
        raise RunError(f"{path}: an adapter without its run cannot be continued")
    return RunDirectory(path)


def find_adapter(name: str) -> Path:
    """The adapter folder of the run that `find_run` finds, or the adapter that it is.

    Raises:
        RunError: the run has no adapter yet.
    """
    path = find_run(name)
    if is_bare_adapter(path):
        return path
    run = RunDirectory(path)
    if not run.adapter.is_dir():
        if run.is_held:
            raise RunError(f"{path}: is being trained and has no adapter yet")
        raise RunError(f"{path}: has no adapter (status {run.facts()['status']}); lora resume run={path} finishes it")
    return run.adapter


def is_bare_adapter(path: Path) -> bool:
    """Whether `path` is an adapter without a run around it, as PEFT saves it, or a model that was trained whole."""
    return any((path / name).is_file() for name in ("adapter_config.json", "lora.json"))


def run_of(config: Mapping[str, Any], directory: Path | None) -> RunDirectory | None:
    """The newest run of exactly this configuration, finished or not, or None.

    With `directory`, only that folder is looked at.

    Raises:
        RunError: `directory` holds a run of another configuration; the differing keys are named.
    """
    wanted = signature(config)
    if directory is not None:
        if not (directory / "run.json").exists():
            return None
        if read_json(directory / "run.json").get("signature") != wanted:
            keys = _differing_keys(config, read_saved_config(directory))
            raise RunError(f"{directory}: was started with another configuration; differs in {', '.join(keys[:6])}")
        return RunDirectory(directory)
    found = [file.parent for file in _ROOT.glob(f"*_{wanted}*/run.json") if read_json(file).get("signature") == wanted]
    return RunDirectory(max(found, key=lambda path: (path.name[:10], len(path.name), path.name))) if found else None


def finished_runs() -> dict[str, Path]:
    """Signature → the run under runs/ that was finished last with it."""
    found: dict[str, tuple[str, Path]] = {}
    for run in all_runs():
        # A damaged folder is none to use again.
        with suppress(RunError):
            facts = read_json(run.path / "run.json")
            if facts.get("status") == "finished":
                each = (str(facts.get("finished")), run.path)
                found[str(facts.get("signature"))] = max(each, found.get(str(facts.get("signature")), each))
    return {signature: path for signature, (_, path) in found.items()}


def all_runs() -> list[RunDirectory]:
    """Every run under runs/, those of sweeps and comparisons too, in the order of their names."""
    files = sorted(_ROOT.glob("**/run.json"))
    return [RunDirectory(file.parent) for file in files if file.parts[1] != "latest"]


def _beside(path: Path) -> list[str]:
    """The runs and adapters in the folder that `path` would be in, as they would be typed."""
    with suppress(OSError):
        found = [
            each for each in sorted(path.parent.iterdir()) if (each / "run.json").exists() or is_bare_adapter(each)
        ]
        return [each.as_posix() for each in found]
    return []


def _newest() -> Path:
    started: dict[tuple[float, str], Path] = {}
    for run in all_runs():
        # A damaged folder is none to go on with.
        with suppress(RunError, ValueError):
            time = datetime.strptime(str(read_json(run.path / "run.json").get("started")), "%Y-%m-%dT%H:%M:%S%z")
            started[time.timestamp(), run.path.as_posix()] = run.path
    if not started:
        raise RunError("run=latest: no run under runs/ yet; lora train makes one")
    return started[max(started)]


def _from_here(path: Path) -> Path:
    """The folder that a link leads to, as seen from the current directory if it lies below."""
    target, here = path.resolve(), Path.cwd().resolve()
    return target.relative_to(here) if target.is_relative_to(here) else target


def _differing_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    left, right = result_keys(ours), result_keys(theirs)
    return sorted(key for key in left.keys() | right.keys() if left.get(key) != right.get(key))
