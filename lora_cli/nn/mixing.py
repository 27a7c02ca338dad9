"""What the adapters of a batch do to one module's output. Knows one module; where rows stand is told by `seats`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_cli.dropout import of_block, unseen
from lora_cli.errors import AdapterError
from lora_cli.nn.layers import LoraLayer
from lora_cli.nn.seats import Seating, Seats
from lora_cli.nn.tokens import TokenRows

__all__ = ["Part", "Slot"]

_TOGETHER = 8_000_000
"""Up to this many multiplications the adapters of a batch are computed as one.

One product over all of them, of which each row keeps its own block, grows with their number; one after the other they
do not, but each takes four calls. For MiniLM (384) and r 8, on one core: 8 adapters on 32 tokens took 0.80 of the time
together, on 384 tokens 1.15; 32 adapters 1.1 on 32 tokens, 3.5 on 384.
"""


_Stack = tuple[Tensor, Tensor, Tensor]
"""All A, all s B, and the number of the adapter of each rank."""


@dataclass
class Part:
    """What computes one module for one adapter."""

    module: nn.Module
    is_beside: bool
    """Whether it starts from the base's output, as nothing inside it but A, B and the like is the adapter's own."""
    rank: int | None
    """Of a layer that only adds s B A x to that output, the rows of A."""
    _pair: tuple[Tensor, Tensor] | None = None
    _state: list[tuple[int, int]] | None = None

    @classmethod
    def of(cls, module: nn.Module, *, is_beside: bool) -> Part:
        """The part that this module is."""
        pair = module.pair() if is_beside and isinstance(module, LoraLayer) else None
        return cls(module, is_beside, None if pair is None else len(pair[0]))

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and s B of a layer that has a rank: kept until one is written to, unless gradients are wanted."""
        layer = self.module
        assert isinstance(layer, LoraLayer)
        parameters = [p for p in layer._parameters.values() if p is not None]
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        state = None if trains else [(p._version, p.data_ptr()) for p in parameters]
        if self._pair is None or state is None or state != self._state:
            pair = layer.pair()
            assert pair is not None, "it would have no rank"
            self._pair, self._state = (pair[0], pair[1] * layer.scaling), state
        return self._pair

    def compute(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor, take: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The module's output for the adapter's rows, which `take` takes of any tensor; `output` is the base's."""
        if self.is_beside:
            assert isinstance(self.module, LoraLayer | TokenRows)
            return self.module.adapted(take(next(iter((*args, *kwargs.values())))), take(output))
        # Past its hooks: what they do to a batch, the base's have done.
        computed: Tensor = self.module.forward(*map(take, args), **{key: take(x) for key, x in kwargs.items()})
        return computed


class Slot:
    """What the adapters of a batch do to one module's output. `parts`: number of an adapter → what computes it."""

    def __init__(self, name: str, parts: Mapping[int, Part]) -> None:
        self.name, self._parts = name, parts
        self._layers = {n: part.module for n, part in parts.items() if part.rank and isinstance(part.module, LoraLayer)}
        self._others = {number: part for number, part in parts.items() if number not in self._layers}
        self._replacing = {number for number, part in self._others.items() if not part.is_beside}
        self._rank = sum(part.rank or 0 for part in parts.values())
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}
        self._stack: _Stack | None = None
        self._turned: dict[torch.dtype, dict[int, tuple[Tensor, Tensor]]] = {}
        self.was_called = False

    def start(self, seating: Seating, *, is_training: bool) -> None:
        """A batch begins."""
        self._seating, self.was_called = seating, False
        for part in self._parts.values():
            if part.module.training != is_training:
                part.module.train(is_training)

    def begin(self, module: nn.Module, args: object) -> None:
        """The module's forward pre-hook."""
        unseen(self._seating.present <= self._replacing)

    def answer(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor:
        """The module's forward hook."""
        self.was_called = True
        unseen(False)
        x, *others = (*args, *kwargs.values())
        if not all(isinstance(each, Tensor) for each in (x, output, *others)):
            raise AdapterError(f"{self.name}: takes or returns more than tensors, so rows cannot differ there")
        seats = self._seating.seats(x, self.name)
        if self._layers:
            output = self._added(x, output, seats)
        return self._replaced(args, kwargs, output, seats) if self._others else output

    def _added(self, x: Tensor, output: Tensor, seats: Seats) -> Tensor:
        """`output`, in place, with the updates that are sums."""
        layers = self._layers
        work = x.shape[:-1].numel() * self._rank * (x.shape[-1] + output.shape[-1])
        drops = any(layer.training and not isinstance(layer.dropout, nn.Identity) for layer in layers.values())
        self._refresh()
        if len(layers) > 1 and work <= _TOGETHER and not drops:
            A, B, block = self._stacked()
            h = functional.linear(x, A.to(x.dtype))
            # Filled, not multiplied by zero: another adapter's infinity must not reach this row.
            h = h.masked_fill_(seats.outside(block, x.ndim), 0.0)
            return output.add_(functional.linear(h, B.to(h.dtype)))
        # With gradients every update of a part in place would be a step of autograd over the whole.
        if not (drops or torch.is_grad_enabled()) and x.dtype == output.dtype and output.is_contiguous():
            self._add_by_runs(x, output, seats)
            return output
        for number, layer in layers.items():
            if seats.has(number):
                A, B = self._pairs[number]
                with of_block(number):
                    h = functional.linear(layer.dropout(seats.take(x, number)), A.to(x.dtype))
                output = seats.add(output, number, functional.linear(h, B.to(h.dtype)).to(output.dtype))
        return output

    def _add_by_runs(self, x: Tensor, output: Tensor, seats: Seats) -> None:
        """The same where rows stand, without a copy of them: as many products as there are changes of adapter."""
        x, output = x.reshape(-1, x.shape[-1]), output.view(-1, output.shape[-1])
        tokens, turned = len(x) // len(seats.owner), self._turned_to(x.dtype)
        sizes = [len(x)] if seats.is_whole else [size * tokens for _, size in seats.runs]
        for (number, _), own, update in zip(seats.runs, torch.split(x, sizes), torch.split(output, sizes), strict=True):
            if number in turned:
                A, B = turned[number]
                update.addmm_(torch.mm(own, A), B)

    def _refresh(self) -> None:
        """Have A and s B of each layer, as they are now."""
        pairs = {number: self._parts[number].pair() for number in self._layers}
        if any(pair is not self._pairs.get(number) for number, pair in pairs.items()):
            self._pairs, self._stack, self._turned = pairs, None, {}

    def _turned_to(self, dtype: torch.dtype) -> dict[int, tuple[Tensor, Tensor]]:
        """A and s B of each layer as factors of rows: (I, R) and (R, O)."""
        if dtype not in self._turned:
            self._turned[dtype] = {number: (A.to(dtype).T, B.to(dtype).T) for number, (A, B) in self._pairs.items()}
        return self._turned[dtype]

    def _stacked(self) -> _Stack:
        if self._stack is None:
            numbers = torch.tensor([number for number, (A, _) in self._pairs.items() for _ in range(len(A))])
            factors_A, factors_B = zip(*self._pairs.values(), strict=True)
            self._stack = torch.cat(factors_A), torch.cat(factors_B, dim=1), numbers.to(factors_A[0].device)
        return self._stack

    def _replaced(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor, seats: Seats) -> Tensor:
        """`output` with the rows of the other adapters computed by their own modules."""
        found = {}
        for number, part in self._others.items():
            if seats.has(number):
                with of_block(number):
                    y = part.compute(args, kwargs, output, partial(seats.take, number=number))
                found[number] = y.to(output.dtype)
        return seats.put(output, found)
