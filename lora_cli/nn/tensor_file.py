"""Tensors as a safetensors file. Knows what the disk may answer, no name of a file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["save_tensors"]

_REASON = re.compile(r"\(os error (\d+)\)")


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write contiguous `tensors`, of which no two share memory, to `file`.

    Raises:
        OSError: the disk is full, or whatever else it refuses; safetensors would hide that in an error of its own.
    """
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:
        reason = _REASON.search(str(error))
        if reason is None:
            raise
        number = int(reason[1])
        raise OSError(number, os.strerror(number), str(file)) from error
