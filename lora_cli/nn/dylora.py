"""The rank that DyLoRA draws in training, one for all layers. Knows when a model runs forward; not its layers.

What a layer does with it is in `variants.DyLoRA`.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["DrawnRank"]


class DrawnRank:
    """A rank b from 1 to r, drawn anew before each forward pass of `model` in training, each as likely as another.

    It comes from torch's own generator. In our loop, which seeds that by step and micro-step, b depends on these alone:
    a resumed training draws the same, and the micro-steps of an accumulated step draw one each.
    """

    def __init__(self, model: nn.Module, r: int) -> None:
        self.r = r
        self.current: int | None = None
        """b; None before the first draw."""
        # A hook on the whole model: no layer could tell whether it is the first one of a pass.
        self._hook = model.register_forward_pre_hook(self._draw)

    def _draw(self, module: nn.Module, args: object) -> None:
        if module.training:
            self.current = int(torch.randint(1, self.r + 1, ()))

    def stop(self) -> None:
        """Draw no more."""
        self.current = None
        self._hook.remove()
