"""Rows of tokens that a base model lacks: drawn, trained on a frozen embedding, merged. Knows modules, no tokenizer.

A row is a token's place in the input embedding and, where it is another weight, in the output layer. Layers that share
one weight share the rows that train.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_cli.errors import AdapterError
from lora_cli.nn.layers import generator_for

__all__ = ["TokenRows", "draw_rows", "token_layers", "vocabulary_layers"]

_SPREAD = 0.1
_CHUNK = 4096


class TokenRows(nn.Module):
    """A frozen embedding, or a Linear that computes logits, of whose rows some are replaced by rows that train.

    A new layer computes what its base does, up to rounding. `new_rows` stays fp32 and is cast at use. `owner` is the
    layer over the same weight whose rows this one uses. `weight` is the effective weight, for models that bypass
    `forward`.

    Shapes: V rows of size D, of which n train; base weight (V, D), new_rows (n, D).
    """

    index: Tensor
    place: Tensor

    def __init__(self, base_layer: nn.Module, index: Sequence[int], owner: TokenRows | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        weight = base_layer.get_parameter("weight")
        rows = torch.tensor(index, device=weight.device)
        place = torch.full(weight.shape[:1], -1, device=weight.device)
        place[rows] = torch.arange(len(rows), device=weight.device)
        # Buffers, so that they follow the layer to its device; not in its state, being no result of training.
        self.register_buffer("index", rows, persistent=False)
        self.register_buffer("place", place, persistent=False)
        self.is_owner = owner is None
        """Whether the rows are this layer's own."""
        self.new_rows: nn.Parameter = owner.new_rows if owner else nn.Parameter(weight.detach()[rows].float())
        # The base's rows while merged. Shared like the weight they belong to.
        self._unmerged: list[Tensor] = owner._unmerged if owner else []

    @property
    def is_merged(self) -> bool:
        """Whether the base weight contains the rows."""
        return bool(self._unmerged)

    @property
    def weight(self) -> Tensor:
        """The effective weight (V, D) in the base's dtype; computed anew at each reading unless merged."""
        weight = self.base_layer.get_parameter("weight")
        return weight if self.is_merged else weight.index_copy(0, self.index, self.new_rows.to(weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Token numbers → (..., D), or (..., D) → logits (..., V)."""
        base: Tensor = self.base_layer(x)
        return base if self.is_merged else self.adapted(x, base)

    def adapted(self, x: Tensor, base: Tensor) -> Tensor:
        """The layer's output from the base's, unmerged; of logits, in the base's memory."""
        if isinstance(self.base_layer, nn.Embedding):
            place = self.place[x]
            rows = functional.embedding(place.clamp(min=0), self.new_rows).to(base.dtype)
            scale: Tensor | float = getattr(self.base_layer, "embed_scale", 1.0)
            rows = rows * (scale.to(base.dtype) if isinstance(scale, Tensor) else scale)
            return torch.where((place < 0).unsqueeze(-1), base, rows)
        bias: Tensor | None = getattr(self.base_layer, "bias", None)
        logits = functional.linear(x, self.new_rows.to(x.dtype), None if bias is None else bias[self.index].to(x.dtype))
        # In place: logits are the largest tensor there is, and nobody else has seen these.
        return base.index_copy_(-1, self.index, logits.to(base.dtype))

    @torch.no_grad()
    def merge(self) -> float:
        """Write the rows into the base weight, for all layers that share it. Returns the largest change.

        Raises:
            AdapterError: already merged, or a row is not finite in the base's dtype (the base is left as it was).
        """
        if self.is_merged:
            raise AdapterError("the rows are merged already")
        weight = self.base_layer.get_parameter("weight")
        rows = self.new_rows.to(weight.dtype)
        if not rows.isfinite().all():
            raise AdapterError(f"a row is not finite in {weight.dtype}; merge into a base of a wider dtype")
        self._unmerged.append(weight[self.index])
        weight[self.index] = rows
        return float((rows.float() - self._unmerged[0].float()).abs().max())

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base's rows back, bit for bit.

        Raises:
            AdapterError: not merged.
        """
        if not self.is_merged:
            raise AdapterError("the rows are not merged, so they cannot be unmerged")
        self.base_layer.get_parameter("weight")[self.index] = self._unmerged.pop()

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return f"new_rows={len(self.index)}" + ", merged" * self.is_merged


def token_layers(model: nn.Module) -> dict[str, TokenRows]:
    """Module name → layer with new rows, in the model's order; those that share another's rows are not named."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, TokenRows)}
    return {name: layer for name, layer in found.items() if layer.is_owner}


def vocabulary_layers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Name of the input embedding, and of the output layer if its weight is another → names of all modules that share
    the weight, that one first. Empty for a model that does not tell them, as transformers' do."""
    found: dict[str, tuple[str, ...]] = {}
    for method in ("get_input_embeddings", "get_output_embeddings"):
        layer = getattr(model, method, lambda: None)()
        name = next((name for name, module in model.named_modules() if module is layer), None)
        if name is None or any(name in names for names in found.values()):
            continue
        weight = _base(model, name).get_parameter("weight")
        owners = [
            owner.removesuffix(".base_layer")
            for owner, module in model.named_modules(remove_duplicate=False)
            if module._parameters.get("weight") is weight
        ]
        found[name] = tuple(dict.fromkeys([name, *owners]))
    return found


@torch.no_grad()
def draw_rows(model: nn.Module, tokens: Mapping[int, str], *, num_known: int, seed: int) -> None:
    """Initialise the rows of `tokens` (number → name) in the embedding and the output layer of `model`, in place.

    Each is the mean of the first `num_known` rows plus a tenth of their standard deviation times normal noise, from a
    generator that depends on (`seed`, layer, token) only. At the mean, a new token takes little probability from the
    others; the noise tells new tokens apart.
    """
    for name in vocabulary_layers(model):
        weight = model.get_submodule(name).get_parameter("weight")
        mean, deviation = _moments(weight[:num_known])
        for number, token in tokens.items():
            noise = torch.randn(len(mean), generator=generator_for(seed, f"{name}:{token}"), dtype=torch.float64)
            weight[number] = (mean + _SPREAD * deviation * noise).to(weight)


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the rows, in fp64, without a copy of them all."""
    chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    mean = sum((chunk.double().sum(0).cpu() for chunk in chunks), torch.zeros(())) / len(rows)
    squares = ((chunk.double().cpu() - mean).square().sum(0) for chunk in chunks)
    return mean, (sum(squares, torch.zeros(())) / len(rows)).sqrt()


def _base(model: nn.Module, name: str) -> nn.Module:
    """The frozen layer at `name`, whatever was put around it."""
    module = model.get_submodule(name)
    return module.get_submodule("base_layer") if hasattr(module, "base_layer") else module
