"""Where the files of the configuration lie, and the names that its groups accept. Knows nothing of what they say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_cli.words import config_dirs

__all__ = ["conf_dir", "folders", "group_options"]


def conf_dir() -> Path:
    """The shipped conf/: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return next(path for path in (package / "conf", package.parent / "conf") if (path / "train.yaml").is_file())


def folders(words: Sequence[str]) -> list[Path]:
    """Where groups lie, in the order in which Hydra looks."""
    return [*config_dirs(words), conf_dir(), Path("conf")]


def group_options(group: str, words: Sequence[str] = ()) -> list[str]:
    """Names that `group=` accepts: the shipped YAML files, those of ./conf, and of a --config-dir among `words`."""
    return sorted({file.stem for folder in folders(words) for file in (folder / group).glob("*.yaml")})
