"""Frozen linear layers kept in 4 or 8 bits, and LoRA over them. The only file that knows bitsandbytes, imported late.

What is kept is what bitsandbytes keeps: NF4 in blocks of 64 with the blocks' sizes quantised too (QLoRA, Dettmers et
al. 2023, arXiv:2305.14314, sections 3 and "double quantization"), or int8 with a size for each row (the weights of
LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339). Its layers are not used, only its kernels: Linear8bitLt rounds
inputs as well when scoring, but not when training on a CPU, and Linear4bit repacks its weight when scoring on some
CPUs. Here a weight is dequantised for the moment in which it is multiplied by, always to the same numbers, so that a
run scores in `lora eval` as it did in training, and merging is exact.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_cli.errors import AdapterError, ConfigError
from lora_cli.nn.layers import LoraConv1D, LoraLayer, LoraLinear
from lora_cli.nn.variants import VARIANTS

__all__ = [
    "STORAGES",
    "LoraQuantizedLinear",
    "QuantizedLinear",
    "QuantizedSize",
    "Storage",
    "dequantize",
    "quantize",
    "quantized_layers",
    "quantized_size",
]

_KEY = "model.quantization"


class Storage(Protocol):
    """One way to keep a matrix in few bits."""

    def encode(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """What is kept of it, by name."""
        ...

    def decode(self, kept: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The matrix (out, in) that is left."""
        ...


class _NF4:
    """4 bits a weight; for each 64 of them the largest in 8 bits, for each 256 of these the largest in fp32."""

    block, blocks = 64, 256

    def encode(self, weight_OI: Tensor) -> dict[str, Tensor]:
        quantize_4bit = _functional().quantize_4bit
        packed, state = quantize_4bit(weight_OI, blocksize=self.block, compress_statistics=True, quant_type="nf4")
        sizes = {"absmax": state.absmax, "absmax_mean": state.offset, "absmax_absmax": state.state2.absmax}
        return {"packed": packed, **sizes, "absmax_code": state.state2.code, "code": state.code}

    def decode(self, kept: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        library = _functional()
        sizes = library.QuantState(
            absmax=kept["absmax_absmax"], code=kept["absmax_code"], blocksize=self.blocks, dtype=torch.float32
        )
        state = library.QuantState(
            absmax=kept["absmax"],
            # On processors with AVX-512 it takes rows of 16 n numbers for whole blocks, whether or not they are.
            shape=shape if shape[-1] % self.block == 0 else (shape.numel(),),
            code=kept["code"],
            blocksize=self.block,
            quant_type="nf4",
            dtype=dtype,
            offset=kept["absmax_mean"],
            state2=sizes,
        )
        weight: Tensor = library.dequantize_4bit(kept["packed"], state)
        return weight.view(shape)


class _Int8:
    """8 bits a weight, for each row the largest in fp32."""

    def encode(self, weight_OI: Tensor) -> dict[str, Tensor]:
        rows, absmax, _ = _functional().int8_vectorwise_quant(weight_OI.half())
        return {"packed": rows, "absmax": absmax}

    def decode(self, kept: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        # Scaled in fp32, rounded once.
        return (kept["packed"] * (kept["absmax"] / 127)[:, None]).to(dtype)


STORAGES: dict[str, Storage] = {"nf4": _NF4(), "int8": _Int8()}
"""Name in `model.quantization` → how weights are kept."""


def _functional() -> Any:
    """bitsandbytes' functions.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(_KEY, "", "needs a package: pip install 'lora-cli[quant]'")
    # It logs advice on kernels that are not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional


class QuantizedLinear(nn.Module):
    """A frozen Linear or `Conv1D` whose weight is kept in few bits. Computes in the input's dtype, or autocast's.

    What is kept are buffers, so that it moves with the model; the bias stays a parameter. `weight` is dequantised at
    each reading, in the layout and dtype that the layer had: some models read it.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Module, storage: str, *, original: Tensor | None = None) -> None:
        super().__init__()
        self.is_transposed = LoraConv1D.fits(linear)
        matrix = _matrix(linear).detach()
        self.storage, self.dtype = storage, matrix.dtype
        self.out_features, self.in_features = matrix.shape
        for name, tensor in STORAGES[storage].encode(matrix.contiguous()).items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", linear.bias if isinstance(linear.bias, nn.Parameter) else None)
        # In a tuple: no module of this one.
        self._empty = (_with_parameters(linear, {}),)
        self.original = original
        """The weight (out, in) that was quantised, until an init has read it."""

    @property
    def matrix(self) -> Tensor:
        """The dequantised weight (out, in), computed anew."""
        shape = torch.Size((self.out_features, self.in_features))
        with torch.no_grad():
            return STORAGES[self.storage].decode(dict(self.named_buffers()), shape, self.dtype)

    @property
    def weight(self) -> Tensor:
        """The dequantised weight as the layer had it: of a Conv1D, (in, out)."""
        return self.matrix.T if self.is_transposed else self.matrix

    @property
    def num_weights(self) -> int:
        """Numbers in the weight."""
        return int(self.out_features * self.in_features)

    @property
    def num_bytes(self) -> int:
        """What is kept of the weight takes in memory."""
        return sum(kept.nbytes for kept in self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        product: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def plain(self, matrix: Tensor) -> nn.Module:
        """The layer that was quantised, with its bias, and with another weight (out, in)."""
        weight = (matrix.T if self.is_transposed else matrix).to(self.dtype).contiguous()
        parameters = {"weight": nn.Parameter(weight, requires_grad=False), "bias": self.bias}
        return _with_parameters(self._empty[0], parameters).train(self.training)

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, storage={self.storage}"


def _matrix(linear: nn.Module) -> Tensor:
    """The weight of a Linear or Conv1D, quantised or not, as (out, in)."""
    if isinstance(linear, QuantizedLinear):
        return linear.matrix
    return (LoraConv1D if LoraConv1D.fits(linear) else LoraLinear).matrix_of(linear)


def _with_parameters(module: nn.Module, parameters: dict[str, nn.Parameter | None]) -> nn.Module:
    """A copy of `module` with these for its own: its class need not be known to make one."""
    made = copy.copy(module)
    made._parameters = parameters
    return made


class _Product(torch.autograd.Function):
    """x Wᵀ. Neither pass keeps the dequantised W, nor x, as W does not train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.matrix.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.matrix.to(gradient.dtype), None


class LoraQuantizedLinear(LoraLayer):
    """Over a `QuantizedLinear` (QLoRA, arXiv:2305.14314, eq. 5): y = x dequantised(W)ᵀ + s B A x.

    Merging puts a plain layer with the dequantised and updated weight in place of the base, and unmerging the
    quantised one back: quantising anew would round the update away.
    """

    def __init__(self, base_layer: nn.Module, **options: Any) -> None:
        super().__init__(base_layer, **options)
        # In a list: no module of its own while it is out of use.
        self._aside: list[QuantizedLinear] = []

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """A quantised Linear."""
        return isinstance(module, QuantizedLinear)

    @classmethod
    def matrix_of(cls, base_layer: nn.Module) -> Tensor:
        """The dequantised weight (out, in); a plain one while merged."""
        return _matrix(base_layer)

    @classmethod
    def shape_of(cls, base_layer: nn.Module) -> tuple[int, int]:
        """(out, in), without dequantising."""
        if isinstance(base_layer, QuantizedLinear):
            return base_layer.out_features, base_layer.in_features
        return super().shape_of(base_layer)

    @property
    def original(self) -> Tensor:
        """The base weight before it was quantised, as (out, in)."""
        assert isinstance(self.base_layer, QuantizedLinear)
        assert self.base_layer.original is not None, "what needs it is refused by name without"
        return self.base_layer.original

    @property
    def device(self) -> torch.device:
        """Where the base layer is."""
        return next(iter([*self.base_layer.buffers(), *self.base_layer.parameters()])).device

    @property
    def is_merged(self) -> bool:
        """Whether a plain layer that contains the update stands in for the base."""
        return bool(self._aside)

    @property
    def quantized(self) -> QuantizedLinear:
        """The quantised base, merged or not."""
        quantized = self._aside[0] if self._aside else self.base_layer
        assert isinstance(quantized, QuantizedLinear)
        return quantized

    @property
    def weight(self) -> Tensor:
        """The effective weight, in the layout and dtype that the base had."""
        matrix = self.matrix if self.is_merged else VARIANTS[self.variant].merged_weight(self).to(self.quantized.dtype)
        return matrix.T if self.quantized.is_transposed else matrix

    def _replace(self, merged: Tensor) -> Tensor:
        """Put a plain layer with this weight in place of the quantised base; returns the dequantised one."""
        quantized = self.quantized
        self._aside.append(quantized)
        self.base_layer = quantized.plain(merged.T if quantized.is_transposed else merged)
        return quantized.weight

    def _restore(self) -> None:
        self.base_layer = self._aside.pop()


@dataclass(frozen=True)
class QuantizedSize:
    """What quantising saved."""

    kind: str
    """How the weights are kept."""
    layers: int
    weights: int
    """Numbers in them."""
    bytes: int
    """What is kept of them, all that it takes to dequantise included."""
    fp32_bytes: int
    """What they would take in fp32."""

    def describe(self) -> str:
        """One line for people."""
        kept, full = self.bytes / 2**20, self.fp32_bytes / 2**20
        return f"{self.layers} linear layers as {self.kind}: {kept:,.1f} MiB, {kept / full:.0%} of {full:,.1f} in fp32"

    def facts(self) -> dict[str, Any]:
        """As a plain dict."""
        return asdict(self)


def quantize(
    model: nn.Module, storage: str, *, skip: Iterable[str], device: torch.device, keep_original: bool = False
) -> None:
    """Replace every Linear and Conv1D of `model` in place, one at a time: moved to `device`, quantised, let go.

    With `keep_original` the weights stay where they were loaded, for `lora.init=loftq`; `inject` lets them go.

    Left as they are: modules named in `skip` and all in them, and a layer whose weight another module shares. Of
    subclasses of `nn.Linear` none is replaced, as it may read its weight in ways of its own.

    Raises:
        ConfigError: the model has no such layer, or bitsandbytes is not installed.
    """
    outside = tuple(f"{name}." for name in skip)
    owners: dict[int, set[int]] = defaultdict(set)
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].add(id(module))
        if (type(module) is nn.Linear or LoraConv1D.fits(module)) and not f"{name}.".startswith(outside):
            names[id(module)].append(name)
    num_replaced = 0
    for aliases in names.values():
        linear = model.get_submodule(aliases[0])
        if len(owners[id(linear.weight)]) > 1:
            continue
        original = _matrix(linear).detach() if keep_original else None
        layer = QuantizedLinear(linear.to(device), storage, original=original).train(linear.training)
        for name in aliases:
            model.set_submodule(name, layer)
        num_replaced += 1
    if not num_replaced:
        raise ConfigError(_KEY, storage, "this model has no linear layers besides its head and output embedding")


def dequantize(model: nn.Module) -> None:
    """Put plain layers with the dequantised weights in place of all quantised ones of `model`.

    Raises:
        AdapterError: an adapter over one of them is not merged.
    """
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, LoraQuantizedLinear) and not module.is_merged:
            raise AdapterError(f"{name}: merge the adapter first")
        if isinstance(module, QuantizedLinear):
            model.set_submodule(name, module.plain(module.matrix))


def quantized_layers(model: nn.Module) -> list[QuantizedLinear]:
    """The quantised layers of `model`, adapted or not."""
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def quantized_size(model: nn.Module) -> QuantizedSize | None:
    """Measured on the tensors; None: nothing is quantised."""
    layers = quantized_layers(model)
    if not layers:
        return None
    weights = sum(layer.num_weights for layer in layers)
    kept = sum(layer.num_bytes for layer in layers)
    return QuantizedSize(layers[0].storage, len(layers), weights, kept, 4 * weights)
