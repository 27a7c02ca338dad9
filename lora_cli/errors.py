"""What can go wrong, and who must act. Knows nothing but names and text.

LoraError
├── UserError            the user's to mend: one line, exit code 2
│   ├── ConfigError      a key or a value
│   │   └── UnknownName  a name outside a known set; suggests the nearest
│   ├── DataError        a file, a column, a row
│   ├── ModelError       a base model that is missing, damaged or unsuited
│   ├── AdapterError     an adapter that does not fit its base
│   └── RunError         a run folder that is missing, unfinished or damaged
└── TrainingFailure      ours or the machine's (NaN, disk, memory): one line, exit code 1
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Sequence

__all__ = [
    "INTERRUPTED",
    "AdapterError",
    "ConfigError",
    "DataError",
    "LoraError",
    "ModelError",
    "RunError",
    "TrainingFailure",
    "UnknownName",
    "UserError",
    "in_words",
    "listed",
    "nearest",
    "printable",
]

INTERRUPTED = "interrupted"
"""What is said of work that a person or a scheduler has ended."""
_MAX_NAMES = 12
_MAX_LISTED = 180
"""Names, and characters of them, listed in a message; more would not fit on the one line a person reads."""


class LoraError(Exception):
    """Anything this package raises on purpose; its text is one line a person can act on."""


class UserError(LoraError):
    """The user can mend it. Exit code 2."""


class ConfigError(UserError):
    """A config key has a value that cannot be used; "" stands for no value at all."""

    def __init__(self, key: str, value: object, allowed: str) -> None:
        self.key, self.value, self.allowed = key, value, allowed
        super().__init__(f"{key}={printable(value)}: {allowed}" if value != "" else f"{key}: {allowed}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.key, self.value, self.allowed)


class UnknownName(ConfigError):  # noqa: N818 - it is what it says
    """A name is not among the known ones.

    `what` completes "no such ...": task, layer, metric.
    """

    def __init__(self, key: str, value: object, options: Iterable[str], what: str = "") -> None:
        self.options, self.what = sorted(set(options)), what
        near = nearest(str(value), self.options)
        hint = f" Did you mean {near}?" if near else ""
        super().__init__(key, value, f"no such {what or 'name'}.{hint} There are: {listed(self.options)}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.key, self.value, self.options, self.what)


class DataError(UserError):
    """A data file, column or row cannot be used. `where` is the file, with the line if known."""

    def __init__(self, where: object, problem: str) -> None:
        self.where, self.problem = where, problem
        super().__init__(f"{printable(where)}: {problem}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.where, self.problem)


class ModelError(UserError):
    """A base model is missing, damaged, or not made for the task."""


class AdapterError(UserError):
    """An adapter is damaged, hostile, or does not fit its base model."""


class RunError(UserError):
    """A run folder is missing, unfinished, in use or damaged."""


class TrainingFailure(LoraError):  # noqa: N818
    """Training cannot go on for a reason that no config key explains. Exit code 1."""


def in_words(error: Exception) -> str:
    """What a person is told of an error that ends one piece of work among others."""
    return str(error) if isinstance(error, LoraError) else f"{type(error).__name__}: {error}"


def nearest(name: str, options: Sequence[str]) -> str | None:
    """The option a person most likely meant by `name`, or None.

    An option whose last dotted part equals `name`'s is taken first ("r" means "lora.r"),
    then the most similar spelling.
    """
    leaf = name.rsplit(".", 1)[-1]
    same_leaf = [option for option in options if option.rsplit(".", 1)[-1] == leaf]
    if same_leaf:
        return min(same_leaf, key=lambda option: (option.count("."), option))
    close = difflib.get_close_matches(name, options, n=1)
    if not close:
        leaves = {option.rsplit(".", 1)[-1]: option for option in reversed(options)}
        close = [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=1)]
    return close[0] if close else None


def listed(options: Sequence[str], room: int = _MAX_LISTED) -> str:
    """The first of `options` that fit into so many characters, and how many more there are."""
    names: list[str] = []
    for option in options[:_MAX_NAMES]:
        name = printable(option, 40)
        if names and len(", ".join([*names, name])) > room:
            break
        names.append(name)
    rest = len(options) - len(names)
    return (", ".join(names) or "none") + (f" and {rest} more" if rest else "")


def printable(value: object, limit: int = 120) -> str:
    """`value` as text that is safe on a terminal: control characters escaped, cut to `limit`."""
    text = "".join(
        char if unicodedata.category(char)[0] != "C" else char.encode("unicode_escape").decode()
        for char in str(value)[: 2 * limit]
    )
    return text if len(text) <= limit else text[: limit - 1] + "…"
