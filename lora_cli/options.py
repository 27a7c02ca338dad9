"""Where the files of the configuration lie, and the names that its groups accept. Knows nothing of what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_cli.words import config_dirs

__all__ = ["PLUG_INS", "conf_dir", "folders", "group_options", "own_plug_ins", "plug_ins"]

PLUG_INS = ("launcher", "sweeper")
"""Groups of hydra/ that say how a sweep is run."""


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


def plug_ins(kind: str) -> dict[str, dict[str, Any]]:
    """Hydra's launchers or sweepers that are installed, ours among them: name → settings with their defaults."""
    return {name: settings for name, (_, settings) in _plug_ins(kind).items()}


def own_plug_ins(kind: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Those of ours: name → the dotted path of its class, and its settings with their defaults."""
    return {name: each for name, each in _plug_ins(kind).items() if each[0].startswith("hydra_plugins.lora.")}


def _plug_ins(kind: str) -> dict[str, tuple[str, dict[str, Any]]]:
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins
    from omegaconf import OmegaConf

    Plugins.instance()  # Imports them all, and each says what it takes.
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for file, stored in ConfigStore.instance().repo["hydra"][kind].items():
        settings: Any = OmegaConf.to_container(stored.node, resolve=False)
        found[file.removesuffix(".yaml")] = str(settings.pop("_target_")), settings
    return found
