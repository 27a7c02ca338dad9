"""Hydra: from command-line words to a checked dataclass. The only file that sees a DictConfig.

Knows nothing of torch, of models or of run folders: what a saved run contributes arrives as plain dicts.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.disk import unless_empty
from lora_cli.errors import ConfigError, LoraError, RunError, UnknownName, printable
from lora_cli.misconfigured import IN_THE_WAY, bad_value, explain, unknown_key
from lora_cli.options import conf_dir, group_options
from lora_cli.spec import TASK_KINDS, VERBS, ModelSpec, TrainRun, nested_specs
from lora_cli.words import config_dirs, prepare, sweep_folder, take_literals

__all__ = [
    "SAVED_GROUPS",
    "Job",
    "complete",
    "compose",
    "group_flags",
    "launch",
    "read_train_run",
    "to_plain",
]

SAVED_GROUPS = ("task", "model")
"""Groups that eval and infer take from the saved run, as the option `_run`."""

_ENVIRONMENT = re.compile(r"(?<!\\)\$\{\s*oc\.env\b")


@dataclass(frozen=True)
class Job:
    """One point of a command: what to run and where Hydra says its files belong.

    `spec` gives the checked config, or raises UserError: a bad point of a sweep is a failure of that point only.
    `directory` is None unless the user chose one with hydra.run.dir or the job is part of a sweep.
    """

    spec: Callable[[], Any]
    directory: Path | None
    overrides: tuple[str, ...]
    sweep_number: int | None
    sweep: Path | None
    """The folder of the sweep that it is a job of."""


def launch(
    verb: str,
    words: Sequence[str],
    run_job: Callable[[Job], float | None],
    *,
    saved: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Compose the config of `verb` from `words` and call `run_job` on it, once or, with -m, for each point.

    `saved` are the groups of a saved run, used where the user names no option of theirs.
    All of Hydra's flags work (-m, --cfg, --config-dir, --info, ...).

    Raises:
        UserError: any word that does not make a valid config; nothing has run or been written by then.
    """
    from hydra import main as hydra_main

    groups = [name for name, nested in nested_specs(TrainRun) if nested and (conf_dir() / name).is_dir()]
    named = [name for name, nested in nested_specs(VERBS[verb]) if name in groups and not nested]
    literals, words = take_literals(words, named)
    _register_schemas(verb)
    _register_user_conf()
    _register_saved(saved or {})
    failures: list[BaseException] = []

    def task_function(cfg: Any) -> float | None:
        # Hydra would print a line of its own and lose the exception's type, so the first one waits here.
        try:
            return run_job(_job(cfg, literals))
        except Exception as error:
            failures.append(error)
            return None

    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sweep, words = sweep_folder(verb, words)
    sys.argv = [f"lora {verb}", *prepare(words, VERBS[verb])]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise where it would print and exit with 1
    try:
        with unless_empty(sweep, besides="multirun.yaml"), _composed_once(words), _null_tables_take_keys():
            hydra_main(version_base="1.3", config_path=str(conf_dir()), config_name=verb)(task_function)()
    except (LoraError, MemoryError):
        raise
    except Exception as error:
        # What the disk refuses is not the user's mistake, unless explain() knows how they can mend it.
        is_disks = isinstance(error, OSError) and error.errno is not None and not isinstance(error, IN_THE_WAY)
        if is_disks or os.environ.get("LORA_DEBUG") == "1":
            raise
        raise explain(error, verb) from error
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error
    if failures:
        raise failures[0]


def complete(verb: str, words: Sequence[str], saved: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Answer a shell's TAB through Hydra, with COMP_LINE already without the verb."""
    from hydra import main as hydra_main

    _register_schemas(verb)
    _register_user_conf()
    _register_saved(saved or {})
    sys.argv = ["lora", *words]
    hydra_main(version_base="1.3", config_path=str(conf_dir()), config_name=verb)(lambda cfg: None)()


def compose(verb: str, words: Sequence[str]) -> Any:
    """The checked config that `words`, as a job got them, make of `verb`. Only while `launch` runs a job, whose folders
    of groups count here too.

    Raises:
        UserError: the words do not make a valid config.
    """
    from hydra import compose as hydra_compose

    _register_schemas(verb)
    try:
        return _validated(hydra_compose(config_name=verb, overrides=list(words)))
    except LoraError:
        raise
    except Exception as error:
        raise explain(error, verb) from error


def group_flags() -> list[str]:
    """Flags by which another command finds the folders of groups that this one was given."""
    return [f"--config-dir={folder}" for folder in config_dirs(sys.argv)]


def to_plain(spec: object) -> dict[str, Any]:
    """`spec` as nested dicts, lists and scalars: what a run folder stores."""
    return dataclasses.asdict(spec)  # type: ignore[call-overload, no-any-return]


def read_train_run(saved: Mapping[str, Any], *, trusted: bool = False) -> TrainRun:
    """The typed configuration of a saved run, whose config.yaml holds `saved`.

    `trusted`: the code of its checkpoint may run, which no run says of itself.

    Raises:
        UserError: a key is unknown, or a value is not what its key takes.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    kind = _kind_of(saved.get("task"))
    try:
        schema = OmegaConf.merge(OmegaConf.structured(TrainRun), {"task": OmegaConf.structured(TASK_KINDS[kind])})
        found = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.create(dict(saved))))
    except OmegaConfBaseException as error:
        raise RunError(f"saved config: {error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(found, TrainRun)
    return dataclasses.replace(found, model=dataclasses.replace(found.model, trust_remote_code=trusted))


@contextmanager
def _composed_once(words: Sequence[str]) -> Iterator[None]:
    """Spare Hydra to compose everything twice: the first time is only to learn hydra.mode, which no file of ours sets.
    That is half of the time from the words to the config.
    """
    from hydra._internal.hydra import Hydra

    if any("hydra.mode" in word for word in words) or config_dirs(words) or Path("conf").is_dir():
        yield
        return
    get_mode = Hydra.get_mode
    Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = get_mode  # type: ignore[method-assign]


@contextmanager
def _null_tables_take_keys() -> Iterator[None]:
    """Let an override put keys into a table that is null so far, which OmegaConf cannot merge into."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from omegaconf import DictConfig, OmegaConf
    from omegaconf._utils import is_structured_config

    apply = ConfigLoaderImpl._apply_overrides_to_config

    def opening(overrides: Sequence[Any], cfg: Any) -> None:
        for override in overrides:
            parts = override.key_or_group.split(".")
            above = [] if override.is_delete() else [".".join(parts[:depth]) for depth in range(1, len(parts))]
            for key in [*above, *([override.key_or_group] if isinstance(override.value(), dict) else [])]:
                parent, _, name = key.rpartition(".")
                holder = OmegaConf.select(cfg, parent) if parent else cfg
                node = holder._get_node(name) if isinstance(holder, DictConfig) and not holder._is_none() else None
                # A table of a type is a group's, which needs its name.
                if (
                    isinstance(node, DictConfig)
                    and node._is_none()
                    and not is_structured_config(node._metadata.ref_type)
                ):
                    OmegaConf.update(cfg, key, {}, merge=False)
            apply([override], cfg)

    ConfigLoaderImpl._apply_overrides_to_config = staticmethod(opening)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl._apply_overrides_to_config = staticmethod(apply)  # type: ignore[method-assign]


def _job(cfg: Any, literals: Mapping[str, str]) -> Job:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    hydra = HydraConfig.get()
    typed = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    assert isinstance(typed, list)
    sweeping = hydra.mode == RunMode.MULTIRUN
    directory, here = Path(hydra.runtime.output_dir), Path.cwd()
    own = sweeping or directory != here
    if directory.is_relative_to(here):
        directory = directory.relative_to(here)
    return Job(
        spec=lambda: dataclasses.replace(_validated(cfg), **literals),
        directory=directory if own else None,
        overrides=tuple(map(str, typed)),
        sweep_number=int(hydra.job.num) if sweeping else None,
        sweep=Path(hydra.sweep.dir) if sweeping else None,
    )


def _validated(cfg: Any) -> Any:
    """The dataclass tree of `cfg`: keys known, nothing missing, interpolations resolved, ranges checked."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _reject_unknown(cfg, "")
    _reject_environment(OmegaConf.to_container(cfg, resolve=False), "")
    _check_recipe(cfg)
    try:
        if missing := sorted(OmegaConf.missing_keys(cfg)):
            raise ConfigError(missing[0], "", f"needs a value: {missing[0]}=...")
        return OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise bad_value(error) from error


def _reject_unknown(node: Any, path: str) -> None:
    """Refuse keys that no dataclass has. Hydra's `+key=` adds them even to a typed node, where they would vanish."""
    from omegaconf import DictConfig, OmegaConf

    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing() or node._is_interpolation():
        return
    schema = OmegaConf.get_type(node)
    known = {f.name for f in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else None
    for key in node:
        name = f"{path}.{key!s}" if path else str(key)
        if (known is not None and key not in known) or str(key).startswith("_"):
            raise unknown_key(name, OmegaConf.get_type(node._get_root()) or TrainRun)
        _reject_unknown(node._get_node(key), name)


def _reject_environment(node: Any, path: str) -> None:
    """Refuse ${oc.env:...}: a run's files hold all of its config, and the environment holds tokens."""
    if isinstance(node, Mapping | list):
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            _reject_environment(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, str) and _ENVIRONMENT.search(node):
        raise ConfigError(path, node, "the environment is not read into a run's files; type the value itself")


def _check_recipe(cfg: Any) -> None:
    """Refuse a task that a recipe says nothing of, and the part of a recipe that is about one."""
    from omegaconf import OmegaConf

    recipe = OmegaConf.select(cfg, "recipe")
    if recipe is None:
        return
    if OmegaConf.is_missing(recipe, "name"):
        raise ConfigError("recipe", "", "name the recipe alone; task=NAME chooses which of its trainings")
    if OmegaConf.is_missing(recipe, "epochs"):
        options = group_options(f"recipe/{recipe.name}", sys.argv)
        raise UnknownName("task", cfg.task.name, options, f"task of recipe={recipe.name}")


def _kind_of(task: Any) -> str:
    """The kind of a saved task."""
    kind = task.get("kind") if isinstance(task, Mapping) else None
    if kind not in TASK_KINDS:
        raise RunError(f"saved config: task.kind={printable(kind)} is none of {', '.join(TASK_KINDS)}")
    return str(kind)


@functools.cache
def _register_schemas(verb: str) -> None:
    """Those that a config of `verb` is made of; turning a dataclass into a schema takes longer than composing."""
    from hydra.core.config_store import ConfigStore

    # For each config Hydra copies all that is stored, the schemas of every verb so far, and then only reads the copy.
    ConfigStore.__deepcopy__ = lambda store, _: store  # type: ignore[attr-defined]
    store = ConfigStore.instance()
    store.store(group="schema", name=verb, node=VERBS[verb], package="_global_")
    for kind, schema in TASK_KINDS.items():
        store.store(group="schema/task", name=kind, node=schema)
    store.store(group="schema", name="model", node=ModelSpec)


def _register_user_conf() -> None:
    """Let ./conf add options to our groups; ours come first, so a stray conf/ cannot replace them."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    own = Path("conf").resolve()
    if not own.is_dir() or own == conf_dir():
        return

    class UserConf(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            # Registered for good: a later command in this process may run elsewhere.
            if Path("conf").resolve() == own:
                search_path.append("user", own.as_uri())

    Plugins.instance().register(UserConf)


def _register_saved(saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Offer a saved run's groups as option `_run`, typed and checked: a run folder is data from outside."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for group in SAVED_GROUPS:
        # Of an earlier command in this process.
        ConfigStore.instance().repo.get(group, {}).pop("_run.yaml", None)
    for group, values in saved.items():
        if not isinstance(values, Mapping):
            raise RunError(f"saved config: {group}={printable(values, 40)} is no mapping of keys")
        schema = TASK_KINDS[_kind_of(values)] if group == "task" else ModelSpec
        try:
            node = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(dict(values)))
        except OmegaConfBaseException as error:
            raise RunError(f"saved config: {group}.{error.full_key}: {str(error).splitlines()[0]}") from error
        ConfigStore.instance().store(group=group, name="_run", node=node)
