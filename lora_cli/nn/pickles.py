"""Tensors in torch.save's files from strangers. The only place that opens a pickle, and only as a table of tensors.

`weights_only` lets a pickle name tensors and containers, nothing else; the archive's own sizes are checked before.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_cli.disk import open_plain
from lora_cli.errors import AdapterError, printable
from lora_cli.nn.untrusted import where

__all__ = ["read_pickle"]

_MAX_BYTES = 16 << 30
_MAX_TENSORS = 1 << 16


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Name → tensor of a flat state dict that torch.save wrote; floats only, nothing larger than the file.

    Raises:
        AdapterError: it is no such file, is damaged, or names anything but tensors.
    """
    with open_plain(path, AdapterError, limit=_MAX_BYTES) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise AdapterError(f"{where(path)}: not a file of torch.save (1.6 or newer), or damaged") from error
        # torch stores without compression; a compressed member could be of any size once unpacked.
        if any(m.compress_type != zipfile.ZIP_STORED or m.file_size > size for m in members):
            raise AdapterError(f"{where(path)}: holds compressed data, which torch.save does not write")
        file.seek(0)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            # Whatever a hostile pickle makes torch raise.
            reason = printable(str(error).partition("\n")[0], 100)
            raise AdapterError(f"{where(path)}: not readable as tensors only ({reason})") from error
    if not isinstance(state, Mapping) or not state or len(state) > _MAX_TENSORS:
        raise AdapterError(f"{where(path)}: a table of 1 to {_MAX_TENSORS:,} tensors is needed")
    return {_name(path, name): _tensor(path, name, value, size) for name, value in state.items()}


def _name(path: Path, name: object) -> str:
    if not isinstance(name, str) or not name:
        raise AdapterError(f"{where(path)}: {printable(name, 60)} is no name of a tensor")
    return name


def _tensor(path: Path, name: object, value: object, size: int) -> Tensor:
    is_plain = type(value) in (Tensor, nn.Parameter)
    if not isinstance(value, Tensor) or not is_plain or value.layout != torch.strided or value.device.type != "cpu":
        raise AdapterError(f"{where(path)}: {printable(name, 80)} is no plain tensor")
    # A view may claim to be larger than what is stored.
    if value.numel() * value.element_size() > size:
        raise AdapterError(f"{where(path)}: {printable(name, 80)} {list(value.shape)} is larger than the file")
    if not value.is_floating_point():
        raise AdapterError(f"{where(path)}: {printable(name, 80)} has dtype {value.dtype}; floats only")
    return value.detach().contiguous()
