"""Checks of a value that several specs make; each raises a ConfigError that names the key."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from lora_cli.errors import ConfigError, UnknownName
from lora_cli.spec.names import MAX_SEED

__all__ = ["at_least", "check_seed", "check_seeds", "each_once", "one_of", "plain_names", "positive", "share"]


def one_of(key: str, value: str, options: Iterable[str], what: str) -> None:
    """Refuse a value that is none of `options`, and name the nearest."""
    if value not in options:
        raise UnknownName(key, value, options, what)


def at_least(key: str, value: int | None, least: int, *, optional: bool = False) -> None:
    """Refuse a number below `least`, and null unless it is optional."""
    if value is None and optional:
        return
    if value is None or value < least:
        raise ConfigError(key, value, f"a whole number, {least} or more" + (", or null" if optional else ""))


def positive(key: str, value: float) -> None:
    """Refuse what is not a finite number above 0."""
    if not 0 < value < math.inf:
        raise ConfigError(key, value, "a number above 0")


def share(key: str, value: float) -> None:
    """Refuse what is not in [0, 1)."""
    if not 0 <= value < 1:
        raise ConfigError(key, value, "a share from 0 up to, not including, 1")


def each_once(key: str, values: Sequence[object]) -> None:
    """Refuse an empty list, and one that repeats itself."""
    if not values or len(set(values)) != len(values):
        raise ConfigError(key, values, "one or more, each once")


def plain_names(key: str, names: Sequence[str], such_as: str) -> None:
    """Refuse names of options that could not name folders as well, and one that is there twice."""
    each_once(key, names)
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
            raise ConfigError(key, name, f"a plain name, such as {such_as}")


def check_seeds(key: str, values: Sequence[int]) -> None:
    """Refuse a list of seeds with one that no generator takes, or one twice."""
    each_once(key, values)
    for seed in values:
        check_seed(key, seed)


def check_seed(key: str, value: int | None, *, optional: bool = False) -> None:
    """Refuse a seed that no generator takes, and null unless it is optional."""
    if value is None and optional:
        return
    if value is None or not 0 <= value <= MAX_SEED:
        raise ConfigError(key, value, f"a whole number from 0 to {MAX_SEED}")
