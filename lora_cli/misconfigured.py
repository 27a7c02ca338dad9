"""What Hydra and OmegaConf say of a config that cannot be made, in one line for people. Sees no config itself."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_cli.disk import shown
from lora_cli.errors import ConfigError, RunError, UnknownName, UserError, nearest, printable
from lora_cli.options import PLUG_INS, folders, group_options, own_plug_ins, plug_ins
from lora_cli.spec import TASK_KINDS, VERBS, all_keys, nested_specs
from lora_cli.words import is_sweep, value_of

__all__ = ["IN_THE_WAY", "bad_value", "explain", "unknown_key"]

_WANTED = {
    "converted to Integer": "a whole number",
    "converted to Float": "a number",
    "not a valid bool": "true or false",
    "is not a ListConfig": "a list, such as [a,b]",
    "is not Optional": "needs a value, which null is not",
}
"""What OmegaConf says of a value → what is allowed, in our words."""
_SAID_VALUE = re.compile(r"Value '([^']*)'")
_PACKAGED = ("joblib", "ray", "submitit")
"""Launchers of Hydra's own packages: how their names begin."""
_IN_FILE = re.compile(r"In '([^']+)': \w+ raised while composing config:\n(.*)\n\s*full_key: (\S+)")
"""Hydra on a YAML file: its name, the problem, the key."""
IN_THE_WAY = (FileExistsError, NotADirectoryError, PermissionError)
"""What the disk refuses and the user can mend."""


def explain(error: Exception, verb: str) -> UserError:
    """The one-line form of what Hydra or OmegaConf raised while composing the config of `verb`."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    if isinstance(error, IN_THE_WAY):
        fault = "may not be written" if isinstance(error, PermissionError) else "a file is in the way"
        key = "hydra.sweep.dir" if is_sweep(sys.argv) else "hydra.run.dir"
        return RunError(f"{shown(error.filename)}: {fault}; choose another {key}")
    if isinstance(error.__cause__, UserError):
        return error.__cause__  # A plug-in's own, which Hydra has wrapped up.
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    groups = [name for name, nested in nested_specs(VERBS[verb]) if nested]
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_option(str(error.missing_cfg_file), error.options or ())
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return unknown_key(str(cause.full_key), VERBS[verb])
    if in_file := _IN_FILE.match(str(error)):
        return _wrong_file(*in_file.group(1, 2, 3), root=VERBS[verb])
    text = " ".join(line for line in str(cause or error).splitlines() if not line.startswith(("    ", "See ")))
    if of_plug_in := _of_plug_in(text):
        return of_plug_in
    if text.startswith("Ambiguous value for argument"):
        override = text.split("'")[1]
        key, _, value = override.partition("=")
        return ConfigError(key, value, "several values; add -m to sweep over them")
    if "Multiple values for " in text:
        group = text.partition("Multiple values for ")[2].partition(".")[0]
        return ConfigError(group, "", f"already chosen by the defaults: write {group}=NAME without the +")
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return bad_value(cause)
    if text.startswith("Unexpected type for root"):
        below = next((word for word in sys.argv[1:] if word.lstrip("+").startswith(tuple(f"{g}." for g in groups))), "")
        group = below.lstrip("+").partition(".")[0]
        return ConfigError(printable(below.partition("=")[0]), "", f"needs {group}=NAME besides")
    for group, _, value in (word.partition("=") for word in sys.argv[1:]):
        if group in groups and value in ("null", ""):
            options = ", ".join(group_options(group, sys.argv))
            return ConfigError(group, value, f"needs a name: one of {options}")
    return UserError(printable(text or type(error).__name__, 280))


def unknown_key(key: str, root: type) -> ConfigError:
    """A key that the config `root` does not have, with the nearest that it has."""
    if key.startswith(tuple(f"hydra.{kind}." for kind in PLUG_INS)):
        return _unknown_setting(key)
    settings = [f"hydra.{kind}.{name}" for kind in PLUG_INS for _, each in own_plug_ins(kind).values() for name in each]
    groups = {kind: f"hydra/{kind}" for kind in PLUG_INS}
    near = groups.get(key) or nearest(key, [*all_keys(root), "hydra.run.dir", "hydra.sweep.dir", *settings])
    verb = next((verb for verb, schema in VERBS.items() if schema is root), "train")
    hint = f" Did you mean {near}?" if near else ""
    return ConfigError(printable(key), "", f"no such key.{hint} See lora {verb} --help")


def _unknown_setting(key: str) -> ConfigError:
    """A setting that the chosen launcher or sweeper does not have."""
    kind, _, setting = key.removeprefix("hydra.").partition(".")
    known = plug_ins(kind)
    if having := [name for name, settings in known.items() if setting in settings]:
        chosen = value_of(f"hydra/{kind}", sys.argv) or "basic"
        return ConfigError(key, "", f"is a setting of hydra/{kind}={' or '.join(having)}, not of {chosen}")
    near = nearest(setting, [name for settings in known.values() for name in settings])
    hint = f" Did you mean hydra.{kind}.{near}?" if near else ""
    return ConfigError(printable(key), "", f"no such key.{hint} See lora train --help")


def _of_plug_in(text: str) -> ConfigError | None:
    """What a launcher or a sweeper says in `text`, where it does not name the key."""
    typed = [(key, value) for key, _, value in (word.partition("=") for word in sys.argv[1:])]
    if text.startswith("BasicSweeper does not support"):
        key, value = next(((key, value) for key, value in typed if "interval(" in value), ("hydra/sweeper", "basic"))
        return ConfigError(key, value, "an interval needs hydra/sweeper=optuna")
    if 'Could not detect "srun"' in text:
        return ConfigError("hydra/launcher", value_of("hydra/launcher", sys.argv), "needs SLURM; there is no srun here")
    for kind in PLUG_INS if "`_target_`" in text else ():
        if chosen := value_of(f"hydra.{kind}", sys.argv):
            return ConfigError(f"hydra.{kind}", chosen, f"is a group: write hydra/{kind}={chosen}")
    return None


def bad_value(error: Any) -> ConfigError:
    """Of a value of the wrong type, or one that points nowhere: what OmegaConf raised, in our words."""
    key, text = str(error.full_key or "config"), str(error).splitlines()[0]
    is_empty = any(word.lstrip("+") == f"{key}=" for word in sys.argv)
    return ConfigError(key, _value_of(error, key), f"needs a value: {_wanted(text)}" if is_empty else _wanted(text))


def _missing_option(missing: str, options: Sequence[str]) -> UserError:
    group, _, name = missing.rpartition("/")
    if name == "_run" and not any(word.startswith("run=") and word != "run=" for word in sys.argv):
        return ConfigError("run", "", "needs a value: run=FOLDER, or run=latest")
    if name == "_run":
        return ConfigError(
            group,
            "",
            f"a bare adapter does not say which; give {group}=NAME{' or model.path=FOLDER' * (group == 'model')}",
        )
    if not group:
        return UnknownName("--config-name", name, sorted(VERBS), "config")
    package = name.partition("_")[0]
    if group == "hydra/launcher" and package in _PACKAGED and not any(each.startswith(package) for each in options):
        return ConfigError(group, name, f"needs a package: pip install hydra-{package}-launcher")
    return UnknownName(group, name, group_options(group, sys.argv) or options, group)


def _wrong_file(name: str, problem: str, key: str, *, root: type) -> UserError:
    """A YAML file of the user's own with a key or a value that does not fit."""
    file = next((path for folder in folders(sys.argv) if (path := folder / f"{name}.yaml").is_file()), Path(name))
    if not problem.startswith("Key "):
        return UserError(f"{printable(file)}: {printable(key)}: {_wanted(problem)}")
    known = all_keys(root)
    if key in known:
        group, _, recipe = name.rpartition("/")
        task, options = value_of("task", sys.argv) or "", group_options(name, sys.argv)
        if group == "recipe" and task not in options:
            return UnknownName("task", task, options, f"task of recipe={recipe}")
        first = f"defaults: [/schema/task/KIND@_here_, _self_], KIND one of {', '.join(TASK_KINDS)}"
        return UserError(f"{printable(file)}: {key} is a key of some kinds of task only; begin with {first}")
    near = nearest(key, known)
    return UserError(f"{printable(file)}: no such key {printable(key)}.{f' Did you mean {near}?' if near else ''}")


def _unreadable(error: Any) -> UserError:
    override = str(getattr(error, "override", ""))
    key, equals, value = override.partition("=")
    if not equals:
        return ConfigError(printable(override), "", "overrides look like key=value")
    if re.search(r",\s*(,|$)|^\s*,", value):
        return ConfigError(key, value, "a value is missing beside a comma")
    # Quotes around a whole list would make one text of it.
    quoted = "['...']" if value.startswith("[") else "'...'"
    return ConfigError(key, value, f'cannot be read; put quotes around it: "{key}={quoted}"')


def _wanted(text: str) -> str:
    """What is allowed where OmegaConf says `text` of a value."""
    return next((name for said, name in _WANTED.items() if said in text), text)


def _value_of(error: Any, key: str) -> object:
    override = next((word for word in sys.argv[1:] if word.lstrip("+").startswith(f"{key}=")), None)
    if override is not None:
        typed = override.partition("=")[2]
        # Of several, the one that is wrong.
        said = _SAID_VALUE.match(str(error)) if "," in typed and is_sweep(sys.argv) else None
        return said[1] if said else typed
    return getattr(error, "value", None) or ""
