"""Files from strangers, read without believing them: JSON and safetensors. Knows no adapter.

Nothing is allocated on a file's word: sizes are compared with the file's own before memory is asked for.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_cli.disk import open_plain, parse_object, read_object
from lora_cli.disk import shown as where
from lora_cli.errors import AdapterError, printable

__all__ = ["TensorEntry", "read_header", "read_json", "read_tensor", "where"]

_MAX_JSON_BYTES = 1 << 20
_MAX_HEADER_BYTES = 4 << 20
_MAX_DIMENSIONS = 8
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a safetensors file."""

    dtype: torch.dtype
    """A floating dtype."""
    shape: tuple[int, ...]
    """Its shape."""
    start: int
    """First byte, counted from the start of the file."""
    num_bytes: int
    """Size, which agrees with dtype and shape."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 1 MiB; NaN, Infinity and repeated keys are refused.

    Raises:
        AdapterError: it is missing, too large, no regular file, or not a JSON object.
    """
    return read_object(path, AdapterError, limit=_MAX_JSON_BYTES)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Name → entry of a safetensors file whose tensors fill it exactly, without gap or overlap.

    Raises:
        AdapterError: it is missing, no regular file, truncated or otherwise damaged, or holds other than floats.
    """
    with open_plain(path, AdapterError) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise AdapterError(f"{where(path)}: not a whole safetensors file; truncated?")
        if length > _MAX_HEADER_BYTES:
            raise AdapterError(f"{where(path)}: a header of {length} bytes; at most {_MAX_HEADER_BYTES} are read")
        header = parse_object(file.read(length), path, AdapterError)
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.num_bytes)):
        if entry.start != end:
            raise AdapterError(
                f"{where(path)}: damaged; tensors overlap or leave a gap at byte {min(entry.start, end)}"
            )
        end += entry.num_bytes
    if end != size:
        raise AdapterError(f"{where(path)}: {size} bytes, but the header describes {end}; truncated or damaged")
    return entries


def read_tensor(path: Path, entry: TensorEntry) -> Tensor:
    """The tensor at `entry`, which `read_header` returned for the same file; the caller owns its memory.

    Raises:
        AdapterError: the file changed since, so that the bytes are not there.
    """
    data = bytearray(entry.num_bytes)
    with open_plain(path, AdapterError) as file:
        file.seek(entry.start)
        if file.readinto(data) != entry.num_bytes:  # type: ignore[attr-defined]
            raise AdapterError(f"{where(path)}: it became shorter while it was read")
    if not data:
        return torch.zeros(entry.shape, dtype=entry.dtype)  # Of a layer that AdaLoRA left no rank.
    return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    fault = AdapterError(f"{where(path)}: damaged header at {printable(name, 80)}")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise fault
    shape, offsets = value["shape"], value["data_offsets"]
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2 and len(shape) <= _MAX_DIMENSIONS):
        raise fault
    dtype = _DTYPES.get(str(value["dtype"]))
    if dtype is None:
        raise AdapterError(
            f"{where(path)}: {printable(name, 80)} has dtype {printable(value['dtype'], 20)}; floats only"
        )
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise fault
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], offsets[1] - offsets[0])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
