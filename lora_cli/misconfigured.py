"""What Hydra and OmegaConf say of a config that cannot be made, in one line for people. Sees no config itself."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_cli.disk import shown
from lora_cli.errors import ConfigError, RunError, UnknownName, UserError, nearest, printable
from lora_cli.options import folders, group_options
from lora_cli.spec import TASK_KINDS, VERBS, nested_specs
from lora_cli.words import value_of

__all__ = ["IN_THE_WAY", "bad_value", "explain", "unknown_key"]

_WANTED = {
    "converted to Integer": "a whole number",
    "converted to Float": "a number",
    "not a valid bool": "true or false",
    "is not a ListConfig": "a list, such as [a,b]",
    "is not Optional": "needs a value, which null is not",
}
"""What OmegaConf says of a value → what is allowed, in our words."""
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
        return RunError(f"{shown(error.filename)}: {fault}; choose another hydra.run.dir")
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
    near = nearest(key, [*_all_keys(root), "hydra.run.dir", "hydra.sweep.dir"])
    verb = next((verb for verb, schema in VERBS.items() if schema is root), "train")
    hint = f" Did you mean {near}?" if near else ""
    return ConfigError(printable(key), "", f"no such key.{hint} See lora {verb} --help")


def bad_value(error: Any) -> ConfigError:
    """Of a value of the wrong type, or one that points nowhere: what OmegaConf raised, in our words."""
    key, text = str(error.full_key or "config"), str(error).splitlines()[0]
    return ConfigError(key, _value_of(error, key), _wanted(text))


def _all_keys(root: type, prefix: str = "") -> list[str]:
    """Dotted names of every key of a dataclass tree; a task's keys are those of all kinds."""
    keys = []
    for name, nested in nested_specs(root):
        keys.append(prefix + name)
        for schema in nested:
            keys += _all_keys(schema, f"{prefix}{name}.")
    return list(dict.fromkeys(keys))


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
    return UnknownName(group, name, group_options(group, sys.argv) or options, group)


def _wrong_file(name: str, problem: str, key: str, *, root: type) -> UserError:
    """A YAML file of the user's own with a key or a value that does not fit."""
    file = next((path for folder in folders(sys.argv) if (path := folder / f"{name}.yaml").is_file()), Path(name))
    if not problem.startswith("Key "):
        return UserError(f"{printable(file)}: {printable(key)}: {_wanted(problem)}")
    known = _all_keys(root)
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
    # Quotes around a whole list would make one text of it.
    quoted = "['...']" if value.startswith("[") else "'...'"
    return ConfigError(key, value, f'cannot be read; put quotes around it: "{key}={quoted}"')


def _wanted(text: str) -> str:
    """What is allowed where OmegaConf says `text` of a value."""
    return next((name for said, name in _WANTED.items() if said in text), text)


def _value_of(error: Any, key: str) -> object:
    override = next((word for word in sys.argv[1:] if word.lstrip("+").startswith(f"{key}=")), None)
    if override is not None:
        return override.partition("=")[2]
    return getattr(error, "value", None) or ""
