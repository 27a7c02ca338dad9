"""A Hydra sweeper of our own: Optuna's search over what a command line leaves open.

Hydra's own Optuna sweeper needs an Optuna before 3.0, so this one is over the present one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf

from lora_cli.config import compose
from lora_cli.errors import ConfigError, RunError
from lora_cli.launchers import Isolated
from lora_cli.runs.difference import read_metrics
from lora_cli.runs.sweep import STUDY, read_jobs, record
from lora_cli.screen import Screen, significant
from lora_cli.spec import LOSS_DOWNWARDS
from lora_cli.words import shortened, without_hydras

__all__ = ["Search"]

_STUDY = "study"
_SEEDS = 2**31
"""Half of what a sampler takes, as each start of a study adds to it."""
_MAX_FAILED = 5
"""Failures in a row after which a search ends: more of them would teach it nothing."""


class Search(Sweeper):
    """`trials` trainings, each with values that the ones before suggest (TPE, Bergstra et al. 2011).

    What is searched is typed as any sweep: lora.r=2,4,8, 'train.lr=tag(log,interval(1e-4,1e-2))',
    'lora.alpha=int(interval(8,64))'. The task's first metric decides, in its own direction. With `prune` a training
    that is worse at a scoring than the median of those before it (after five) is stopped; that needs
    hydra/launcher=isolated. The study lies in the sweep's folder: the same command goes on with it.
    """

    __module__ = "hydra_plugins.lora"  # Where Hydra finds it.

    def __init__(self, trials: int = 20, seed: int = 0, prune: bool = True) -> None:
        if type(trials) is not int or trials < 1:
            raise ConfigError("hydra.sweeper.trials", trials, "a whole number, 1 or more")
        if type(seed) is not int or not 0 <= seed < _SEEDS:
            raise ConfigError("hydra.sweeper.seed", seed, f"a whole number from 0 to {_SEEDS - 1}")
        if type(prune) is not bool:
            raise ConfigError("hydra.sweeper.prune", prune, "true or false")
        self._trials, self._seed, self._prune = trials, seed, prune
        self._config: Any = None
        self._launcher: Any = None
        self._context: Any = None
        self._screen = Screen()

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Hydra's way of handing over what it knows."""
        self._config, self._context = config, hydra_context
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Search, and say what was best."""
        optuna = _optuna()
        parser = OverridesParser.create(config_loader=self._context.config_loader)
        parsed = parser.parse_overrides(arguments)
        space = {each.get_key_element(): _distribution(optuna, each) for each in parsed if each.is_sweep_override()}
        if not space:
            raise ConfigError(
                "hydra/sweeper", "optuna", "nothing is left open: give a key several values or an interval"
            )
        fixed = [str(each.input_line) for each in parsed if not each.is_sweep_override()]
        folder = Path(self._config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self._config, folder / "multirun.yaml")
        split, metric = self._goal(fixed, space)
        study = self._study(optuna, folder, metric)
        at_a_time = int(self._config.hydra.launcher.get("n_jobs", 1))
        failed = 0
        while (left := self._trials - _counted(optuna, study)) > 0 and failed < _MAX_FAILED:
            trials = [study.ask(space) for _ in range(min(at_a_time, left))]
            before = _counted(optuna, study)
            self._try(optuna, study, trials, fixed, metric)
            failed = failed + len(trials) if _counted(optuna, study) == before else 0
        if study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)):
            values = " ".join(f"{key}={shortened(value)}" for key, value in study.best_trial.params.items())
            text = f"job {study.best_trial.number}: {values}, {split}/{metric} {significant(study.best_value, 4)}"
            self._screen.fact("best", text)

    def _goal(self, fixed: Sequence[str], space: Mapping[str, Any]) -> tuple[str, str]:
        """The split and the metric that decide; values of what is open are any, as long as they do.

        Raises:
            ConfigError: a key is open whose values are scored by different ones.
        """
        first = {key: _first(distribution) for key, distribution in space.items()}

        def goal_with(values: dict[str, Any]) -> tuple[str, str]:
            words = [f"{key}={value}" for key, value in (first | values).items()]
            task = compose("train", [*without_hydras(fixed), *words]).task
            return task.split, task.metrics[0]

        goal = goal_with({})
        for key in (key for key in space if key.partition(".")[0] in ("task", "recipe")):
            for value in getattr(space[key], "choices", ()):
                if (other := goal_with({key: value})) != goal:
                    scored = f"{first[key]} by {'/'.join(goal)}, {value} by {'/'.join(other)}"
                    raise ConfigError(key, ",".join(space[key].choices), f"a search has one metric: {scored}")
        return goal

    def _study(self, optuna: Any, folder: Path, metric: str) -> Any:
        """The study in the folder; what was being tried when it was interrupted is tried again first."""
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / STUDY)))
        study = optuna.create_study(
            study_name=_STUDY,
            storage=storage,
            direction="minimize" if metric in LOSS_DOWNWARDS else "maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner() if self._prune else optuna.pruners.NopPruner(),
        )
        # A sampler draws from its start on: from one seed it would suggest again what it has suggested.
        study.sampler = optuna.samplers.TPESampler(seed=self._seed + len(study.trials))
        for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params)
            for job in (job for job in read_jobs(folder) if job.number == trial.number):
                record(folder, replace(job, status="left"))
        return study

    def _try(self, optuna: Any, study: Any, trials: Sequence[Any], fixed: Sequence[str], metric: str) -> None:
        """Train these trials, and tell the study what came of them."""
        hopeless: set[int] = set()

        def judge(number: int, path: Path) -> bool:
            if number not in hopeless and _is_hopeless(study, trials[number - trials[0].number], path, metric):
                hopeless.add(number)
            return number in hopeless

        if self._prune and isinstance(self._launcher, Isolated):
            self._launcher.judge = judge
        words = [[*fixed, *(f"{key}={value}" for key, value in trial.params.items())] for trial in trials]
        returned = self._launcher.launch(words, initial_job_idx=trials[0].number)
        for trial, job in zip(trials, returned, strict=True):
            if job.return_value is not None:
                study.tell(trial, float(job.return_value))
            else:
                states = optuna.trial.TrialState
                study.tell(trial, state=states.PRUNED if trial.number in hopeless else states.FAIL)


def _is_hopeless(study: Any, trial: Any, path: Path, metric: str) -> bool:
    """Whether a job is to be stopped, by what its run has scored so far."""
    known = study.get_trials(deepcopy=False)[trial.number].intermediate_values
    with suppress(RunError):
        for row in read_metrics(path):
            value = row.get(f"validation/{metric}")
            if row["step"] not in known and isinstance(value, int | float):
                trial.report(value, row["step"])
                if trial.should_prune():
                    return True
    return False


def _distribution(optuna: Any, swept: Override) -> Any:
    """What is open of a key."""
    value, key, typed = swept.value(), swept.get_key_element(), str(swept.input_line).partition("=")[2]
    if not isinstance(value, IntervalSweep):
        return optuna.distributions.CategoricalDistribution(list(swept.sweep_string_iterator()))
    log = "log" in value.tags
    assert value.start is not None
    assert value.end is not None
    if value.start > value.end:
        raise ConfigError(key, typed, "the lower end comes first")
    try:
        if isinstance(value.start, int) and isinstance(value.end, int):
            return optuna.distributions.IntDistribution(value.start, value.end, log=log)
        return optuna.distributions.FloatDistribution(value.start, value.end, log=log)
    except ValueError as error:
        raise ConfigError(key, typed, str(error)) from error


def _first(distribution: Any) -> Any:
    """Some value of it."""
    return distribution.choices[0] if hasattr(distribution, "choices") else distribution.low


def _counted(optuna: Any, study: Any) -> int:
    """Trials that need not be made again."""
    states = optuna.trial.TrialState
    return len(study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED)))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError("hydra/sweeper", "optuna", "needs a package: pip install 'lora-cli[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
