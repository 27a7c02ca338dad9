"""The words of a command line, made fit for Hydra's parser and grammar. Knows neither Hydra nor what the keys mean."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import typing
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from lora_cli.errors import ConfigError, UserError, nearest, printable
from lora_cli.spec import all_keys, nested_specs

__all__ = [
    "config_dirs",
    "is_sweep",
    "prepare",
    "shortened",
    "sweep_folder",
    "take_literals",
    "value_of",
    "without_hydras",
]

_FLAGS_WITH_VALUE = frozenset(
    f"-{short}" for short in ("c", "p", "cp", "cn", "cd", "i", "-cfg", "-package", "-config-path", "-config-name")
) | {"--config-dir", "--info"}
_FLAG_VALUES = dict.fromkeys(("-c", "--cfg"), ("job", "hydra", "all"))
_FLAGS = _FLAGS_WITH_VALUE | {"-m", "--multirun", "-r", "--run", "--resolve", "--hydra-help", "-sc"}
_FLAGS |= {"--shell-completion", "--experimental-rerun"}
_HYDRA_ONLY = frozenset(
    ("-cp", "--config-path", "-cn", "--config-name", "-sc", "--shell-completion", "--experimental-rerun", "-r", "--run")
)
"""Flags that pass through, but that a person is not pointed to."""
_SWEEPING = frozenset(("-m", "--multirun"))
_HOW_IT_RUNS = ("hydra/launcher=", "hydra.launcher.", "hydra.sweeper.trials=", "sweep.redo=")
"""Words of a sweep that do not tell which runs are wanted."""
_MAX_NAMED = 4
"""Keys in the name of a sweep's folder."""
_LITERAL_KEYS = ("text", "text_pair", "prompt", "system")
"""Keys whose value is the user's own words: never parsed by Hydra's grammar."""
_TEMPLATE_KEYS = frozenset(("task.prompt", "task.target"))
"""Keys whose value has blanks and braces in it, which mean something to Hydra; \\n in them is a line break."""
_PATH_KEYS = frozenset(("run", "input", "output", "model.path", "hydra.run.dir", "hydra.sweep.dir"))
_PATH_KEYS |= {"lora.init_from", "task.data.train", "task.data.validation", "task.data.test"}

_LONG_FRACTION = re.compile(r"-?\d+\.\d{5,}(e-?\d+)?", re.ASCII)


def prepare(words: Sequence[str], root: type) -> list[str]:
    """`words` of a verb with the config `root` as Hydra takes them: flags, then `--`, then overrides.

    Raises:
        UserError: a flag that does not exist, or lacks its value.
    """
    return _flags_first(_opened(words, root), root)


def take_literals(words: Sequence[str], names: Collection[str] = ()) -> tuple[dict[str, str], list[str]]:
    """Replace what the user wrote after text= by a placeholder, so that no grammar reads it.

    `names` are keys that hold the name of an option, whose word is taken out: Hydra would compose what it names.
    """
    literals: dict[str, str] = {}
    rest = []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in names:
            literals[key] = value
            continue
        if equals and key in _LITERAL_KEYS:
            literals[key] = value
            word = f"{key}=given"
        rest.append("input='-'" if word == "-" else word)
    return literals, rest


def value_of(key: str, words: Sequence[str]) -> str | None:
    """What was typed for `key`, or None."""
    return next((word.partition("=")[2].strip("'\"") for word in words if word.startswith(f"{key}=")), None)


def shortened(value: object, digits: int = 4) -> str:
    """A key's value for people: of a fraction with many digits, such as a search draws, so many that count."""
    text = str(value)
    return f"{float(text):.{digits}g}" if _LONG_FRACTION.fullmatch(text) else text


def without_hydras(words: Sequence[str]) -> list[str]:
    """`words` but those that tell Hydra itself something."""
    return [word for word in words if not word.lstrip("+~").startswith(("hydra.", "hydra/"))]


def config_dirs(words: Sequence[str]) -> list[Path]:
    """Folders given with --config-dir."""
    parted = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return [Path(folder) for flag, folder in pairwise(parted) if flag in ("--config-dir", "-cd")]


def is_sweep(words: Sequence[str]) -> bool:
    """Whether -m is among `words`."""
    return not _SWEEPING.isdisjoint(words)


def sweep_folder(verb: str, words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Where the jobs of a sweep go, and `words` that say so; None without -m.

    The same words lead the trainings to the same folder under runs/, whatever the day, unless sweep.redo=all.
    """
    if not is_sweep(words):
        return None, list(words)
    if chosen := value_of("hydra.sweep.dir", words):
        return Path(chosen).expanduser(), list(words)
    if verb != "train":
        folder = Path("runs", f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}_sweep")
        return folder, [*words, f"hydra.sweep.dir={folder.as_posix()}"]
    own = [word for word in words if word not in _SWEEPING and not word.startswith(_HOW_IT_RUNS)]
    swept = "-".join(_swept_keys(own)) or "sweep"
    name = f"sweep_{swept}_{hashlib.sha256(json.dumps(own).encode()).hexdigest()[:8]}"
    there = Path("runs").glob(f"????-??-??_{name}*")
    newest = max(there, key=lambda path: (path.name[:10], len(path.name), path.name), default=None)
    if newest is not None and value_of("sweep.redo", words) != "all":
        folder = newest
    else:
        folder = first = Path("runs", f"{datetime.now():%Y-%m-%d}_{name}")
        number = 1
        while folder.exists():
            number += 1
            folder = first.with_name(f"{first.name}-{number}")
    return folder, [*words, f"hydra.sweep.dir={folder.as_posix()}"]


def _swept_keys(words: Sequence[str]) -> list[str]:
    """The last parts of the keys that have several values, or of all if none has, for a name."""
    parted = [word.lstrip("+~").partition("=")[::2] for word in without_hydras(words) if not word.startswith("-")]
    keys = [key for key, value in parted if "," in _outside_brackets(value)] or [key for key, _ in parted]
    return [re.sub(r"[^A-Za-z0-9]+", "", re.split(r"[./]", key)[-1]) for key in keys][:_MAX_NAMED]


def _outside_brackets(value: str) -> str:
    """`value` without its lists and tables, in which a comma does not separate values of a sweep."""
    while (shorter := re.sub(r"\[[^][]*\]|\{[^}{]*\}", "", value)) != value:
        value = shorter
    return value


def _flags_first(words: Sequence[str], root: type) -> list[str]:
    """Flags, then `--`, then overrides: argparse takes only one block of overrides."""
    flags: list[str] = []
    overrides: list[str] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            overrides.append(word)
            continue
        if word.split("=")[0] not in _FLAGS:
            raise _no_such_flag(word, root)
        flags.append(word)
        if word in _FLAGS_WITH_VALUE:
            flags.append(next(rest, ""))
            options = _FLAG_VALUES.get(word)
            if not flags[-1] or (options and flags[-1] not in options):
                allowed = f"one of {', '.join(options)}" if options else "needs a value"
                raise ConfigError(word, flags[-1], allowed)
    sweeping = not _SWEEPING.isdisjoint(flags)
    return [*flags, *(["--", *(_quoted(word, sweeping) for word in overrides)] if overrides else [])]


def _no_such_flag(word: str, root: type) -> UserError:
    """Other programs have flags where a verb of ours with the config `root` has keys."""
    keys, name = all_keys(root), printable(word.split("=")[0], 60)
    flags = sorted(_FLAGS - _HYDRA_ONLY | {f"--{key}" for key in keys if key == "json"})
    near = nearest(name.lstrip("-"), keys)
    hint = f" Did you mean {f'--{near}' if near == 'json' else f'{near}='}?" if near else ""
    return UserError(f"{name}: no such flag.{hint} There are {', '.join(flags)} and --help")


def _opened(words: Sequence[str], root: type) -> list[str]:
    """Let a table take keys of the user's own, for which Hydra wants ++lora.rank_pattern={query:4}."""
    tables = _tables(root)
    return [f"++{word}" if word.startswith(tables) else word for word in words]


@functools.cache
def _tables(root: type) -> tuple[str, ...]:
    return tuple(_table_keys(root))


def _table_keys(root: type, prefix: str = "") -> Iterator[str]:
    """How overrides of a key that holds a dict begin: "lora.rank_pattern=", "lora.rank_pattern."."""
    hints = typing.get_type_hints(root)
    for name, nested in nested_specs(root):
        if any(typing.get_origin(hint) is dict for hint in (hints[name], *typing.get_args(hints[name]))):
            yield from (f"{prefix}{name}=", f"{prefix}{name}.")
        for schema in nested:
            yield from _table_keys(schema, f"{prefix}{name}.")


def _quoted(word: str, sweeping: bool) -> str:
    """A path or template as one word of Hydra's grammar, in which = ( ) { } and blanks have a meaning, and commas
    when sweeping."""
    key, equals, value = word.partition("=")
    if key in _TEMPLATE_KEYS and value and value[0] not in "'\"":
        literal = value.replace("\\n", "\n").replace("\\t", "\t").replace("${", "\\${")
        return f"{key}='{_escaped(literal)}'"
    if key in _PATH_KEYS and value.startswith("~"):
        # No shell does it behind an equals sign.
        value = os.path.expanduser(value)  # noqa: PTH111 - Path would drop a slash at the end
        word = f"{key}={value}"
    plain = all((char.isascii() and char.isalnum()) or char in ("/._-+*@%" + "," * sweeping) for char in value)
    if not equals or key not in _PATH_KEYS or plain or value[:1] in ("'", '"', "$") or not value:
        return word
    return f"{key}='{_escaped(value)}'"


def _escaped(value: str) -> str:
    """The inside of a text in Hydra's quotes: a backslash means itself there, except in front of a quote."""
    return re.sub(r"(\\+)('|\Z)", r"\1\1\2", value).replace("'", "\\'")
