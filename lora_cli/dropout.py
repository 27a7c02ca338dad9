"""Dropout whose masks cost little on a CPU; trainings that share a batch draw each its own. Knows tensors only.

torch draws a float for each element there: with dropout everywhere that was a ninth of a training step. Here four
elements share a draw of 64 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Streams", "dropout", "mask", "of_block", "quicken", "replayed", "unseen"]

_LEVELS = 1 << 16


class Streams:
    """The random numbers of trainings whose rows share a batch, block after block: each gets what it would draw alone.

    `generator` is the one that all draw from, `states` what each training begins with, and `sizes` how long their
    blocks are in each of the ways that a tensor may have the rows: one after the other, or all tokens of all rows.
    """

    def __init__(
        self, generator: torch.Generator, states: Sequence[torch.Tensor], sizes: Sequence[Sequence[int]]
    ) -> None:
        self._generator, self._states, self._turn = generator, list(states), 0
        self._sizes = {sum(each): list(each) for each in sizes}
        self.block: int | None = None
        """Whose rows alone are computed right now; None: all."""
        self.is_unseen = False
        """Whether all that is computed right now will be replaced."""
        generator.set_state(self._states[0])

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Within it, forward passes draw from these."""
        from torch.nn import functional

        global _streams
        _streams, original = self, functional.dropout

        def drop(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
            # Some models drop without a module.
            return self._by_block(x, lambda part: original(part, p)) if training and p else x

        functional.dropout = drop  # type: ignore[assignment]
        try:
            yield
        finally:
            _streams, functional.dropout = None, original

    def turn_to(self, number: int) -> None:
        """What is drawn next is for this training."""
        if number != self._turn:
            self._states[self._turn] = self._generator.get_state()
            self._generator.set_state(self._states[number])
            self._turn = number

    def replay(self) -> AbstractContextManager[None]:
        """Within it, every training draws again what it draws from now on; whose turn it is has been seen to."""
        return self._replaying(list(self._states), self._turn)

    @contextmanager
    def _replaying(self, states: list[torch.Tensor], turn: int) -> Iterator[None]:
        now = self._states, self._turn
        self._states, self._turn = states, turn
        try:
            yield
        finally:
            self._states, self._turn = now

    def drop(self, x: torch.Tensor, p: float) -> torch.Tensor:
        """`dropout` of each block."""
        return self._by_block(x, lambda part: _drop(part, p))

    def _by_block(self, x: torch.Tensor, drop: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        import torch

        if self.is_unseen:
            return x
        if self.block is not None:
            return drop(x)
        # Of rows that lie end to end the first dimension is 1.
        dimension = 1 if x.ndim > 2 and x.shape[0] == 1 else 0
        parts = []
        for number, part in enumerate(x.split_with_sizes(self._sizes[x.shape[dimension]], dimension)):
            self.turn_to(number)
            parts.append(drop(part))
        return torch.cat(parts, dimension)


_streams: Streams | None = None
"""Those of the batch that is computed right now, if trainings share it."""


@contextmanager
def of_block(number: int) -> Iterator[None]:
    """Within it, only rows of training `number` are computed, if several share a batch."""
    if _streams is None:
        yield
        return
    before, _streams.block = _streams.block, number
    _streams.turn_to(number)
    try:
        yield
    finally:
        _streams.block = before


def unseen(is_unseen: bool) -> None:
    """From now on what is computed will be replaced, so that nothing need be drawn for it; or will not."""
    if _streams is not None:
        _streams.is_unseen = is_unseen


def replayed() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What a layer is computed in, and what again in the backward pass, with the generator as it was the first time."""
    return nullcontext(), nullcontext() if _streams is None else _streams.replay()


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Zero each element of `x` with probability `p` and divide the others by what is left of 1.

    On a CPU `p` is rounded to a multiple of 2⁻¹⁶, for the division too, so the expectation stays that of `x`.
    """
    return _drop(x, p) if _streams is None else _streams.drop(x, p)


def mask(x: torch.Tensor, p: float) -> torch.Tensor | None:
    """What `dropout` multiplies `x`, on a CPU, with: zeros and what the others are divided by; None: nothing is.

    Where several trainings share a batch, only for rows of one of them: see `of_block`.
    """
    if _streams is not None and _streams.is_unseen:
        return None
    assert _streams is None or _streams.block is not None
    return _mask(x, p)


def _drop(x: torch.Tensor, p: float) -> torch.Tensor:
    import torch

    # A compiler has masks that cost little of its own.
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.dropout(x, p, train=True)
    return x * _mask(x, p)


def _mask(x: torch.Tensor, p: float) -> torch.Tensor:
    import torch

    dropped = round(p * _LEVELS)
    if dropped == _LEVELS:
        return torch.zeros_like(x)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    kept = torch.empty(x.shape, dtype=x.dtype)
    # Into floats at once: through a tensor of bools it takes ten times as long.
    torch.ge(draws.view(torch.int16)[: x.numel()].view(x.shape), dropped - _LEVELS // 2, out=kept)
    return kept.mul_(_LEVELS / (_LEVELS - dropped))


def quicken(model: torch.nn.Module) -> None:
    """Let every `nn.Dropout` in `model` (which may be one itself) work by `dropout`."""
    from torch import nn

    for module in model.modules():
        if type(module) is nn.Dropout:
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _forward(module: torch.nn.Dropout, input: torch.Tensor) -> torch.Tensor:
    return dropout(input, module.p) if module.training and module.p else input
