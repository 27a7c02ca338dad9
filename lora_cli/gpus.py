"""Well-known GPUs by what their makers say of them. Knows names and numbers only."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GPUS", "Gpu"]


@dataclass(frozen=True)
class Gpu:
    """One model of GPU."""

    memory_gib: float
    tera_flops: float
    """Peak of dense multiplications in 16 bits (bf16; fp16 where there is no bf16), in 10^12 operations a second."""


GPUS = {
    "t4": Gpu(16, 65),
    "v100-16gb": Gpu(16, 125),
    "v100-32gb": Gpu(32, 125),
    "rtx-3090": Gpu(24, 71),
    "rtx-4090": Gpu(24, 165),
    "a10g": Gpu(24, 70),
    "l4": Gpu(24, 121),
    "l40s": Gpu(48, 362),
    "a100-40gb": Gpu(40, 312),
    "a100-80gb": Gpu(80, 312),
    "h100": Gpu(80, 989),
    "h200": Gpu(141, 989),
    "b200": Gpu(180, 2250),
    "mi300x": Gpu(192, 1307),
}
"""Name in plan.gpu → the GPU."""
