"""Where metrics go besides the run folder: a visible table of trackers, each imported only when chosen."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from lora_cli.errors import ConfigError
from lora_cli.spec import TrackerSpec

__all__ = ["Tracker", "check_tracker", "open_tracker"]


_MLFLOW_PARAMS, _MLFLOW_KEY, _MLFLOW_VALUE = 100, 250, 500
"""Parameters in one request, and characters of each: what every server takes (newer ones take longer values)."""


class Tracker(Protocol):
    """A further record of a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _Nothing:
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The run folder is record enough."""

    def close(self) -> None:
        """Nothing is open."""


class _TensorBoard:
    def __init__(self, spec: TrackerSpec, folder: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))
        # add_hparams would add a point to each metric's curve.
        from torch.utils.tensorboard.summary import hparams

        metrics = dict.fromkeys(f"validation/{name}" for name in (*config["task"]["metrics"], "loss"))
        self._parts: list[Any] = [*hparams(_settings(config), metrics)]  # type: ignore[no-untyped-call]
        for part in self._parts[:2]:
            self._say(part)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._say(self._parts[-1])
        self._writer.close()

    def _say(self, part: Any) -> None:
        self._writer.file_writer.add_summary(part)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What TensorBoard compares the runs of a sweep by: task, model, seed, and all of lora and train."""
    named = {"task": config["task"]["name"], "model": config["model"]["name"], "seed": config["seed"]}
    keys = {f"{group}.{key}": value for group in ("lora", "train") for key, value in config[group].items()}
    known = {key: value for key, value in keys.items() if value is not None and not isinstance(value, Mapping)}
    return named | {key: str(value) if isinstance(value, Sequence) else value for key, value in known.items()}


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Every key by its dotted name, with its value as text."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", str(value)


def _name(folder: Path) -> str:
    """The run's name; a job of a sweep has only a number of its own."""
    path = folder.resolve()
    return f"{path.parent.name}/{path.name}" if path.name.isdigit() else path.name


class _Wandb:
    def __init__(self, spec: TrackerSpec, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._run: Any = wandb.init(project=spec.project, name=_name(folder), dir=str(folder), config=dict(config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, spec: TrackerSpec, folder: Path, config: Mapping[str, Any]) -> None:
        import mlflow

        mlflow.set_experiment(spec.project)
        self._mlflow: Any = mlflow
        mlflow.start_run(run_name=_name(folder))
        # Patterns of layers are keys too, and hold what its names may not.
        named = {re.sub(r"[^\w.-]", "_", key)[:_MLFLOW_KEY]: value[:_MLFLOW_VALUE] for key, value in _flat(config)}
        params = iter(named.items())
        while batch := dict(islice(params, _MLFLOW_PARAMS)):
            mlflow.log_params(batch)
        mlflow.log_dict(dict(config), "config.json")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # A slash means a folder to mlflow; its names may hold one, so they stay the same everywhere.
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


_TRACKERS: dict[str, Callable[[TrackerSpec, Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
}


def check_tracker(spec: TrackerSpec) -> None:
    """Find out before anything is trained that the tracker's package is missing.

    Raises:
        ConfigError: it is not installed.
    """
    if spec.name != "none" and importlib.util.find_spec(spec.name) is None:
        raise ConfigError("tracker", spec.name, f"needs a package: pip install 'lora-cli[{spec.name}]'")


def open_tracker(spec: TrackerSpec, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """The tracker that `spec` names, recording the run in `folder`."""
    return _Nothing() if spec.name == "none" else _TRACKERS[spec.name](spec, folder, config)
