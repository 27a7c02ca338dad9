"""Which part of a tensor belongs to which row of a batch, and so to which adapter. Knows shapes; no adapters.

Inside a model the rows of a batch stand in several ways: one after the other (N, …), with all tokens in one dimension
(N·T, …), repeated by beam search (N·k, …), or end to end without padding (1, T, …), in an order of their own.

Dimensions in names: N rows, T tokens, L whatever a tensor has in the dimension of the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_cli.errors import AdapterError
from lora_cli.row_attention import DECODING, ENCODING

__all__ = ["Seating", "Seats"]

_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
"""Arguments of a model that tell the rows of a batch."""


@dataclass(frozen=True)
class Seats:
    """Where in a tensor each adapter sits."""

    dimension: int
    """The dimension of the rows."""
    owner: Tensor
    """Number of the adapter at each position (L,), -1: none."""
    runs: tuple[tuple[int, int], ...]
    """(adapter, how many positions): neighbours of one adapter, in their order."""
    is_whole: bool = False
    """Whether all of any tensor is the adapter's that is called 0."""

    @cached_property
    def sizes(self) -> Mapping[int, int]:
        """Number of each adapter that sits here → how many positions it has."""
        sizes: Counter[int] = Counter()
        for number, size in self.runs:
            sizes[number] += size
        return sizes

    @cached_property
    def places(self) -> Mapping[int, Tensor]:
        """Number of an adapter → its positions, in their order."""
        numbers = sorted(self.sizes)
        parts = torch.split(self.owner.argsort(stable=True), [self.sizes[number] for number in numbers])
        return dict(zip(numbers, parts, strict=True))

    def has(self, number: int) -> bool:
        """Whether the adapter sits here at all."""
        return number in self.sizes

    def take(self, x: Tensor, number: int) -> Tensor:
        """The adapter's part of `x`."""
        return x if self.is_whole else x.index_select(self.dimension, self.places[number])

    def add(self, x: Tensor, number: int, update: Tensor) -> Tensor:
        """`x`, in place, with `update` added to the adapter's part."""
        return x.add_(update) if self.is_whole else x.index_add_(self.dimension, self.places[number], update)

    def put(self, x: Tensor, parts: Mapping[int, Tensor]) -> Tensor:
        """`x` with these adapters' parts replaced. In the last dimension all become as wide as the widest: -inf."""
        if self.is_whole:
            return parts.get(0, x)
        if not parts:
            return x
        widths = [part.shape[-1] for part in parts.values()]
        # Columns of the base's own output count where a row keeps it.
        width = max(widths if self.sizes.keys() == parts.keys() else [*widths, x.shape[-1]])
        x, *values = (_as_wide(each, width) for each in (x, *parts.values()))
        places = torch.cat([self.places[number] for number in parts])
        return x.index_copy(self.dimension, places, torch.cat(values, self.dimension))

    def outside(self, blocks_R: Tensor, num_dimensions: int) -> Tensor:
        """Where column R, of adapter `blocks_R[R]`, does not belong to the position: broadcasts to (…, R)."""
        outside = self.owner[:, None] != blocks_R
        return outside.view(-1, *[1] * (num_dimensions - 2 - self.dimension), len(blocks_R))


class Seating:
    """The adapters of a batch's rows, followed on their way through a model's forward passes.

    `numbers` names an adapter by number for each row; -1: none.
    """

    def __init__(self, numbers: Sequence[int], num_adapters: int, device: torch.device) -> None:
        self._numbers_N = torch.tensor(numbers)
        self.present = frozenset(numbers)
        """All numbers among them."""
        self._device = device
        is_one = num_adapters == 1 and min(numbers) == 0
        self._whole = Seats(0, self._numbers_N, _runs(self._numbers_N), is_whole=True) if is_one else None
        self._owners: dict[int, Tensor] = {}
        """L → owner of each position."""
        self._is_laid = False
        self._found: dict[tuple[int, int], Seats] = {}
        self._expect({len(numbers): self._numbers_N}, is_laid=False)

    def gather(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A model that lays rows end to end is told to have those of one adapter beside each other: to be its first
        pre-hook. Not with gradients, for which rows are better sorted by length."""
        is_laid = getattr(getattr(module, "config", None), "_attn_implementation", None) in (ENCODING, DECODING)
        if is_laid and not args and "blocks" not in kwargs and not (module.training or torch.is_grad_enabled()):
            mask = kwargs.get("attention_mask")
            # Of rows of one token nobody could tell whether they are meant as rows, in their own order, or as tokens.
            if mask is not None and len(mask) == len(self._numbers_N) < int(mask.sum()):
                return args, {**kwargs, "owners": self._numbers_N}
        return None

    def watch(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pass of the model begins: to be its last pre-hook, so that it sees rows that were laid end to end.

        Raises:
            AdapterError: the batch has another number of rows.
        """
        if (laid := kwargs.get("rows")) is not None:
            self._expect(self._laid_owners(laid, kwargs.get("logits_to_keep")), is_laid=True)
            return
        inputs = next((kwargs[name] for name in _INPUTS if kwargs.get(name) is not None), None)
        if inputs is None:
            inputs = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        rows, tokens = len(inputs), inputs.shape[1] if inputs.ndim > 1 else 1
        given = len(self._numbers_N)
        if rows % given:
            raise AdapterError(f"a batch of {rows} rows, and adapters for {given}")
        sizes = (given, rows, rows * tokens)
        # Beams and returned sequences of a row stand beside each other, and so do its tokens.
        self._expect({size: self._numbers_N.repeat_interleave(size // given) for size in sizes}, is_laid=False)

    def seats(self, x: Tensor, name: str) -> Seats:
        """Where the adapters sit in what goes into the module called `name`.

        Raises:
            AdapterError: the rows share it, so that they cannot have adapters of their own there.
        """
        if self._whole is not None:
            return self._whole
        dimension = 1 if self._is_laid and x.ndim > 1 and x.shape[0] == 1 else 0
        size = x.shape[dimension]
        if size not in self._owners:
            raise AdapterError(
                f"{name}: its input {tuple(x.shape)} is not of the {len(self._numbers_N)} rows, which share it: "
                "a batch has to be of one adapter here"
            )
        key = dimension, size
        if key not in self._found:
            owner = self._owners[size]
            self._found[key] = Seats(dimension, owner.to(self._device), _runs(owner))
        return self._found[key]

    def _expect(self, owners: dict[int, Tensor], *, is_laid: bool) -> None:
        if is_laid or self._is_laid or owners.keys() != self._owners.keys():
            self._owners, self._is_laid, self._found = owners, is_laid, {}

    def _laid_owners(self, laid: Any, kept: Tensor | None) -> dict[int, Tensor]:
        """Of rows laid end to end: of all their tokens, and of the tokens that a decoder computes logits of or, in an
        encoder past its last attention, of each row's first one."""
        num_rows = len(laid.lengths)
        if num_rows != len(self._numbers_N):
            raise AdapterError(f"a batch of {num_rows} rows, and adapters for {len(self._numbers_N)}")
        tokens_T = self._numbers_N[laid.owners().cpu()]
        few = self._numbers_N if kept is None else tokens_T[kept.cpu()]
        # If both are of one size, each row has one token, and the rows stand in the batch's order.
        return {len(few): few, len(tokens_T): tokens_T}


def _runs(owner: Tensor) -> tuple[tuple[int, int], ...]:
    numbers, sizes = torch.unique_consecutive(owner, return_counts=True)
    return tuple(zip(numbers.tolist(), sizes.tolist(), strict=True))


def _as_wide(x: Tensor, width: int) -> Tensor:
    """`x` with so many columns: cut, or filled with -inf."""
    return x if x.shape[-1] == width else functional.pad(x, (0, width - x.shape[-1]), value=-torch.inf)
