"""Where files that are not ours come from: a local mirror, the hub's cache, the hub. Knows nothing of what is in them.

The one place that reads LORA_HUB_ROOT and the one place that may touch the network.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lora_cli.errors import ModelError, UserError, printable

__all__ = [
    "PICKLES",
    "Access",
    "access",
    "check_hub_id",
    "fetch_model",
    "has_weights",
    "mirror_dataset",
    "mirror_model",
    "mirrored",
    "offline",
    "require_network",
]

_HUB_ID = re.compile(r"(?!.*(\.\.|--))[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_PROBE_S = 2.0
_SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
]
_WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]
"""What loading needs; never pickles, nor the same weights in formats for other frameworks."""
_CODE_FILES = ["*.py"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
"""Weights that are not safetensors: loading most of them would run whatever they say."""


def mirror_model(hub_id: str) -> Path | None:
    """The model's folder under LORA_HUB_ROOT, or None."""
    root = _mirror_root()
    folder = root / "models" / check_hub_id(hub_id) if root else None
    return folder if folder and folder.is_dir() else None


def mirror_dataset(hub_id: str, config: str) -> Path | None:
    """The folder under LORA_HUB_ROOT with the Parquet files of one configuration of a data set, or None."""
    root = _mirror_root()
    if root is None or config in ("", ".", "..") or "/" in config or os.sep in config:
        return None
    folder = root / "datasets" / check_hub_id(hub_id) / config
    return folder if any(folder.glob("*.parquet")) else None


def check_hub_id(hub_id: str) -> str:
    """`hub_id` itself, if it could name a repository of the hub.

    Raises:
        UserError: it could not, and would leave the mirror's folder if it were taken for a path.
    """
    if len(hub_id) > 140 or not _HUB_ID.fullmatch(hub_id):
        raise UserError(f"{printable(hub_id)}: neither a folder that exists nor a hub id (owner/name)")
    return hub_id


def require_network(what: str, hint: str) -> None:
    """Return if the hub can be asked for `what`; refuse within three seconds if it cannot.

    Behind a proxy or another endpoint a probe of our own would be wrong, so there is none.

    Raises:
        UserError: HF_HUB_OFFLINE is set, or nobody answers. The text ends with `hint`.
    """
    from huggingface_hub import constants

    missing = f"{printable(what, 100)} is not on this machine"
    if constants.is_offline_mode():
        raise UserError(f"{missing}, and HF_HUB_OFFLINE forbids asking the hub; {hint}")
    if not _is_reached(host := _host()):
        raise UserError(f"{missing}, and there is no connection to {host}; {hint}")


@dataclass(frozen=True)
class Access:
    """How this machine stands with the hub."""

    host: str
    is_forbidden: bool
    """HF_HUB_OFFLINE is set."""
    is_reached: bool
    """It answers, as far as can be told, or stands behind a proxy or endpoint that is not probed."""
    has_token: bool
    cache: Path
    cached: tuple[str, ...]
    """Models and data sets in the hub's cache, whole or not, such as models/owner/name."""


def access() -> Access:
    """What `fetch_model` would meet, told within three seconds. The token itself is read by nobody here."""
    from huggingface_hub import constants, get_token

    cache, is_forbidden, host = Path(constants.HF_HUB_CACHE), bool(constants.is_offline_mode()), _host()
    return Access(
        host=host,
        is_forbidden=is_forbidden,
        is_reached=not is_forbidden and _is_reached(host),
        has_token=get_token() is not None,
        cache=cache,
        cached=tuple(sorted(folder.name.replace("--", "/") for folder in cache.glob("*--*") if folder.is_dir())),
    )


def mirrored() -> tuple[str, ...] | None:
    """What lies under LORA_HUB_ROOT, such as models/owner/name and datasets/owner/name/config; None: it is not set.

    Raises:
        UserError: it names no folder.
    """
    root = _mirror_root()
    if root is None:
        return None
    models = (file.parent for file in root.glob("models/**/config.json"))
    tables = (file.parent for file in root.glob("datasets/**/*.parquet"))
    return tuple(sorted({str(folder.relative_to(root)) for folder in (*models, *tables)}))


def _host() -> str:
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).hostname or "huggingface.co"


def _is_reached(host: str) -> bool:
    if "HF_ENDPOINT" in os.environ or any(kind != "no" for kind in urllib.request.getproxies()):
        return True
    return _answers(host)


def fetch_model(
    hub_id: str,
    revision: str | None = None,
    *,
    code: bool = False,
    weights: bool = True,
    hint: str = "give model.path=FOLDER",
) -> Path:
    """A folder with the hub model's config, tokenizer and safetensors weights: the cache's, else downloaded.

    `code` also takes the Python files of a checkpoint that brings its own architecture; without `weights` only what is
    small is wanted.

    Raises:
        ModelError: the model, its revision or its safetensors weights do not exist, or access is refused.
        UserError: it is not in the cache, and there is no network.
    """
    from huggingface_hub import snapshot_download

    check_hub_id(hub_id)
    patterns = [*_SMALL_FILES, *(_WEIGHT_FILES if weights else ()), *(_CODE_FILES if code else ())]
    cached = _cached(hub_id, revision, patterns, weights=weights)
    if cached:
        return cached
    name = hub_id if revision is None else f"{hub_id} ({revision})"
    require_network(f"model {name}", hint)
    with _explained(hub_id, revision):
        # "*/*": only what lies at the top, not a second copy in onnx/ or openvino/.
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
        if weights and not has_weights(folder):
            raise ModelError(_no_weights(hub_id, revision))
    return folder


def has_weights(folder: Path) -> bool:
    """Whether safetensors weights lie in the folder (all shards or not)."""
    return any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))


def offline() -> contextlib.ExitStack:
    """From now on the hub's libraries refuse to dial out; closing what is returned allows it again."""
    from huggingface_hub import constants

    stack = contextlib.ExitStack()
    # datasets copies the switch when it is imported, so a later import needs no second one.
    modules: list[Any] = [constants, *(sys.modules[name] for name in ("datasets.config",) if name in sys.modules)]
    for module in modules:
        stack.callback(setattr, module, "HF_HUB_OFFLINE", module.HF_HUB_OFFLINE)
        module.HF_HUB_OFFLINE = True
    return stack


def _mirror_root() -> Path | None:
    named = os.environ.get("LORA_HUB_ROOT")
    if not named:
        return None
    root = Path(named).expanduser()
    if not root.is_dir():
        raise UserError(f"LORA_HUB_ROOT={printable(named)}: no such folder (a mirror holds models/ and datasets/)")
    return root


def _answers(host: str) -> bool:
    reached = threading.Event()

    def probe() -> None:
        with contextlib.suppress(OSError), socket.create_connection((host, 443), timeout=_PROBE_S):
            reached.set()

    # A thread, because looking up the name has no timeout of its own.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_PROBE_S + 0.5)
    return reached.is_set()


def _cached(hub_id: str, revision: str | None, patterns: list[str], *, weights: bool) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, revision=revision, local_files_only=True, allow_patterns=patterns))
    except LocalEntryNotFoundError:
        return None
    return folder if (folder / "config.json").is_file() and (has_weights(folder) or not weights) else None


@contextlib.contextmanager
def _explained(hub_id: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(f"{hub_id}: access must be granted on its hub page first, then `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{hub_id}: the hub has no revision {printable(revision)} of it (model.revision)") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"{hub_id}: the hub has no such model, or it is private (`hf auth login`)") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        raise ModelError(f"{hub_id}: the download failed: {printable(error, 100)}") from error


def _no_weights(hub_id: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    names = HfApi().list_repo_files(hub_id, revision=revision)
    pickles = [name for name in names if name.endswith(PICKLES)]
    if not pickles:
        return f"{hub_id}: no weights there ({len(names)} files, none of them .safetensors)"
    return (
        f"{hub_id}: its weights are a pickle ({printable(pickles[0], 40)}), which is never loaded. Give a revision "
        "with safetensors (model.revision=refs/pr/N, see its hub page), or convert it and give model.path=FOLDER"
    )
