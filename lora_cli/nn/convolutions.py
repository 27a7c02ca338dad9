"""Convolutions with low-rank updates, in one to three dimensions and in groups. Knows one layer, as `layers` does.

Dimensions in names: N batch, I in, O out, R rank, K positions of a kernel, S positions of an image; G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from lora_cli.errors import ConfigError
from lora_cli.nn.layers import LoraLayer
from lora_cli.nn.variants import VARIANTS

__all__ = ["Kernel", "LoraConvolution", "check_groups", "kernels_of", "unlike_peft"]

_FORWARDS = {kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
_FUNCTIONS: dict[int, Callable[..., Tensor]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class LoraConvolution(LoraLayer):
    r"""Over an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`: A is a convolution to r channels, B one with kernel 1.

    ΔW = s B A, each output channel's kernel being one row of the matrix (Hu et al. 2021, arXiv:2106.09685, eq. 3, with
    A and B as PEFT has them). A goes over the input exactly as the base does: stride, padding and its mode, dilation.
    In G groups, A and B have the base's groups, so that the update is one of the base's weight.

    Shapes: weight (out, in/G, ...kernel), as a matrix (out, in/G·K); A (r, in/G·K), B (out, r/G); r is a multiple of G.
    """

    is_projection = False

    base_layer: _ConvNd

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """A convolution that computes what torch's does with a weight of its own: not normalised, not transposed."""
        return type(module).forward in _FORWARDS and "weight" in module._parameters

    @classmethod
    def matrix_of(cls, base_layer: nn.Module) -> Tensor:
        """The weight as (out, in/G·K)."""
        return base_layer.get_parameter("weight").flatten(1)

    @classmethod
    def groups_of(cls, base_layer: nn.Module) -> int:
        """G."""
        assert isinstance(base_layer, _ConvNd)
        return base_layer.groups

    @property
    def _channels(self) -> int:
        """The dimension of the channels, counted from the last, as an input may be without a batch."""
        return -1 - len(self.base_layer.kernel_size)

    def _in_layout(self, matrix: Tensor) -> Tensor:
        return matrix.view(self._base_weight.shape)

    def _placed_b(self) -> Tensor:
        """B for all rows of A: each group's outputs see the group's own, zero elsewhere (out, r)."""
        B = self._whole_b()
        if self.num_groups == 1:
            return B
        return torch.block_diag(*B.chunk(self.num_groups))  # type: ignore[no-untyped-call, no-any-return]

    def _reduce(self, x: Tensor) -> Tensor:
        A = self._whole_a().to(x.dtype)
        kernel = A.view(len(A), -1, *self.base_layer.kernel_size)
        # torch's own way from padding, its mode, stride and dilation to an output, whatever it is.
        ax: Tensor = self.base_layer._conv_forward(self.dropout(x), kernel, None)
        return ax.movedim(self._channels, -1)

    def _expand(self, ax_R: Tensor) -> Tensor:
        num_dimensions = len(self.base_layer.kernel_size)
        B = self._whole_b().to(ax_R.dtype)
        pointwise = B.view(*B.shape, *[1] * num_dimensions)
        ax = ax_R.movedim(-1, self._channels)
        return _FUNCTIONS[num_dimensions](ax, pointwise, groups=self.num_groups).movedim(self._channels, -1)

    def adapted(self, x: Tensor, base: Tensor) -> Tensor:
        """The layer's output from the base's, unmerged."""
        # Views: the channels are last in between, where variants expect outputs, and the memory stays as it was.
        return super().adapted(x, base.movedim(self._channels, -1)).movedim(-1, self._channels)


@dataclass(frozen=True)
class Kernel:
    """How a tensor of a convolution stands in PEFT's file, which has kernels, and in A no groups.

    Shapes in a file: A (r, in, ...kernel), B (out, r/G, 1, ...), DoRA's magnitude (1, out, 1, ...).
    """

    outside: ClassVar[str] = "reaches the inputs of other groups, so it is no update of the convolution's own weight"
    """What is wrong with a tensor in a file that `spread` would not have made."""

    own_shape: tuple[int, ...]
    """Ours."""
    shape: tuple[int, ...]
    """In the file."""
    groups: int = 1
    """In how many blocks of rows each sees its own share of the second dimension."""

    def spread(self, own: Tensor) -> Tensor:
        """Our tensor in the file's shape: each block of rows at its share, zero elsewhere."""
        spread = own.new_zeros(self._blocks)
        index = torch.arange(self.groups)
        spread[index, :, index] = own.reshape(*self._blocks[:2], *self._blocks[3:])
        return spread.view(self.shape)

    def gather(self, spread: Tensor) -> Tensor:
        """What `spread` was made of."""
        index = torch.arange(self.groups)
        return spread.reshape(self._blocks)[index, :, index].reshape(self.own_shape)

    @property
    def _blocks(self) -> tuple[int, ...]:
        rows, columns, *kernel = self.shape
        return (self.groups, rows // self.groups, self.groups, columns // self.groups, *kernel)


def check_groups(base_layer: nn.Module, name: str, key: str, r: int, variant: str) -> int:
    """In how many groups the layer called `name` computes; 1 for any other than a convolution.

    Raises:
        ConfigError: the rank, set by `key`, is no multiple of that, or the variant is not known for groups.
    """
    groups = base_layer.groups if isinstance(base_layer, _ConvNd) else 1
    if r % groups:
        raise ConfigError(key, r, f"a multiple of {groups} for {name}, a convolution in {groups} groups")
    if groups > 1 and VARIANTS[variant].scope != "any":
        # PEFT multiplies B and A as if there were no groups, and takes other lengths.
        raise ConfigError("lora.variant", variant, f"not for a convolution in {groups} groups ({name})")
    return groups


def kernels_of(base_layer: nn.Module, r: int) -> dict[str, Kernel]:
    """Parameter of a `LoraConvolution` of rank r over this base → how it stands in PEFT's file."""
    assert isinstance(base_layer, _ConvNd)
    rows, columns = LoraConvolution.matrix_of(base_layer).shape
    groups, size = base_layer.groups, base_layer.kernel_size
    points = (1,) * len(size)
    return {
        "A": Kernel((r, columns), (r, base_layer.in_channels, *size), groups),
        "B": Kernel((rows, r // groups), (rows, r // groups, *points)),
        "magnitude": Kernel((rows,), (1, rows, *points)),
    }


def unlike_peft(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Of these layers, adapted or not yet, those where PEFT (0.21) makes another update of the same tensors → why.

    Its A takes a convolution's stride and padding, but neither its dilation nor the mode of its padding.
    """
    modules = {name: model.get_submodule(name) for name in layers}
    bases = {name: m.base_layer if isinstance(m, LoraConvolution) else m for name, m in modules.items()}
    faults = {name: _fault(base) for name, base in bases.items() if isinstance(base, _ConvNd)}
    return {name: f"{fault}, which PEFT's update of it does not have" for name, fault in faults.items() if fault}


def _fault(base_layer: _ConvNd) -> str | None:
    if any(step != 1 for step in base_layer.dilation):
        return f"a convolution with dilation {base_layer.dilation}"
    return None if base_layer.padding_mode == "zeros" else f"a convolution padded by '{base_layer.padding_mode}'"
