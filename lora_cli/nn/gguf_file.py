"""An adapter as the GGUF file that llama.cpp loads beside a model (--lora). The only file that knows the package gguf.

Names and order of rows are those that llama.cpp gives the base model's own tensors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lora_cli.errors import AdapterError, printable
from lora_cli.nn.stored import StoredAdapter

__all__ = ["FAMILIES", "Heads", "gguf_tensors", "is_installed", "save_gguf"]

FAMILIES: Mapping[str, tuple[str, bool]] = {
    "llama": ("LLAMA", True),
    "mistral": ("LLAMA", True),
    "qwen2": ("QWEN2", False),
    "qwen3": ("QWEN3", False),
}
"""transformers' model_type → llama.cpp's architecture, and whether it orders the rows of query and key anew."""


@dataclass(frozen=True)
class Heads:
    """What the base model's config says of its layers."""

    layers: int
    query: int
    key: int


def is_installed() -> bool:
    """Whether the package gguf is there."""
    return importlib.util.find_spec("gguf") is not None


def gguf_tensors(stored: StoredAdapter, family: str, heads: Heads) -> dict[str, Tensor]:
    """A and B of each linear layer by llama.cpp's names: blk.0.attn_q.weight.lora_a (r, in), .lora_b (out, r).

    Raises:
        AdapterError: a layer that llama.cpp has no name for, or an embedding.
    """
    import gguf

    architecture, is_permuted = FAMILIES[family]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], heads.layers)
    tensors: dict[str, Tensor] = {}
    for name, layer in stored.layers.items():
        theirs = names.get_name(name)
        if theirs is None or layer.is_embedding or layer.is_convolution:
            raise AdapterError(f"{printable(name, 90)}: llama.cpp has no name for its update")
        B = layer.B.float()
        if is_permuted and theirs.endswith((".attn_q", ".attn_k")):
            B = _interleaved_halves(B, heads.query if theirs.endswith(".attn_q") else heads.key)
        tensors |= {f"{theirs}.weight.lora_a": layer.A.float(), f"{theirs}.weight.lora_b": B}
    return tensors


def save_gguf(file: Path, tensors: Mapping[str, Tensor], *, family: str, alpha: float) -> None:
    """Write them in fp32. llama.cpp scales each update by alpha/r, r being the columns of its B."""
    import gguf

    architecture = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[FAMILIES[family][0]]]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved_halves(B_OR: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from (first half, second half), as transformers turns them, to pairs, as llama.cpp does."""
    return B_OR.reshape(num_heads, 2, -1, B_OR.shape[1]).transpose(1, 2).reshape(B_OR.shape)
