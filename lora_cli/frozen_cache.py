"""What the frozen lower layers of a model make of each text, kept between epochs. Knows models without padding (see
`unpadded`); nothing of data sets, adapters or training.

Below the first layer in which something trains, and without dropout there, a text becomes the same hidden states in
every epoch. They are computed once, and from then on only what lies above is run. No module is rewritten: the layers
below give back what they are given, and the first one above takes what is kept. A text is known by its tokens, so
nobody has to say which row of which split it is.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_cli.errors import ConfigError
from lora_cli.row_attention import lay

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FrozenCache"]

_IDS = ("input_ids", "token_type_ids")
"""Arguments of a model that make its hidden states."""

Arguments = dict[str, Any]


class FrozenCache:
    """The inputs of the first layer of `model` that trains, of the texts that `fill` has seen; `close` ends it.

    `model` runs without padding, and what trains in it requires a gradient. It uses what is kept wherever it runs
    without padding, in training as in scoring. Other texts are computed as they come: a bound costs time and nothing
    else. Hidden states agree with those of another batch up to rounding. `forward` runs the model on a few texts, by
    which it is found out what is frozen; `kind` is "memory", or "disk" for a nameless file in the system's temporary
    folder; `limit` is in bytes.

    Raises:
        ConfigError: something trains below or in the first layer, a layer is many, or the base drops out.
    """

    def __init__(self, model: PreTrainedModel, forward: Callable[[], object], *, kind: str, limit: int) -> None:
        self._model, self._kind, self._limit = model, kind, limit
        blocks = _blocks(model)
        if blocks is None:
            raise ConfigError(
                "train.cache", kind, f"not with {model.config.model_type}, one layer of which runs many times"
            )
        self._blocks = blocks
        self.first = self._first_that_trains(forward)
        self.num_bytes = 0
        self._kept: dict[bytes, Tensor] = {}
        self._file = tempfile.TemporaryFile(buffering=0) if kind == "disk" else None  # noqa: SIM115
        self._given: Tensor | None = None
        self._stops = False
        self._laid: Arguments = {}
        self._handles = [
            model.register_forward_pre_hook(self._look_up, with_kwargs=True),
            # Before what the last layer does with its input, if this is the last.
            self._blocks[self.first].register_forward_pre_hook(self._give, prepend=True),
        ]
        for block in self._blocks[: self.first]:
            block.forward = self._skipping(block.forward)

    @property
    def num_texts(self) -> int:
        """Texts that are kept."""
        return len(self._kept)

    def fill(self, forwards: Iterable[Callable[[], object]]) -> None:
        """Run the lower layers in `forwards`, each the model on a batch, until the bound is reached.

        Which texts are kept, and every bit of what is kept, follows from the batches alone: a training that is resumed
        goes on with the same.

        Raises:
            ConfigError: the disk is full.
        """
        self._model.eval()
        for forward in forwards:
            hidden = self._below(forward)
            keys, lengths = _texts(self._laid)
            hidden = hidden[: sum(lengths)]
            if self.num_bytes + hidden.nbytes > self._limit:
                break
            kept = self._store(hidden)
            self._kept.update(zip(keys, torch.split(kept, lengths), strict=True))
            self.num_bytes += hidden.nbytes

    def close(self) -> None:
        """Leave the model as it was, and give back memory or disk."""
        for handle in self._handles:
            handle.remove()
        for block in self._blocks[: self.first]:
            del block.forward
        self._kept = {}
        if self._file:
            self._file.close()

    def _first_that_trains(self, forward: Callable[[], object]) -> int:
        """The number of the last layer whose input needs no gradient, and is no other at another draw of dropout."""
        draws = [_inputs(self._model, self._blocks, forward, seed) for seed in (0, 1)]
        first = sum(not x.requires_grad for x in draws[0]) - 1
        if first < 1:
            allowed = (
                f"only where the lower layers are frozen; the first of {len(self._blocks)} trains, or what is below"
            )
            raise ConfigError("train.cache", self._kind, allowed)
        if not torch.equal(*(inputs[first] for inputs in draws)):
            raise ConfigError("train.cache", self._kind, "only with model.dropout=0: what lower layers give changes")
        return first

    def _skipping(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A lower layer's `forward` that gives back its input where something is kept."""

        def skip(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return forward(hidden, *args, **kwargs) if self._given is None else hidden

        return skip

    def _look_up(self, model: nn.Module, args: Any, kwargs: Arguments) -> None:
        """Find what is kept of the texts of a batch that is laid end to end, and compute what is not."""
        self._given, self._laid = None, kwargs
        if self._stops or kwargs.get("rows") is None:
            return
        keys, lengths = _texts(kwargs)
        found = [self._kept[key] for key in keys if key in self._kept]
        if not found:
            return
        device = kwargs["input_ids"].device
        hidden = torch.cat(found).to(device)
        if len(found) < len(keys):
            is_kept = torch.tensor([key in self._kept for key in keys]).repeat_interleave(torch.tensor(lengths))
            missing = [length for key, length in zip(keys, lengths, strict=True) if key not in self._kept]
            whole = hidden.new_empty(len(is_kept), hidden.shape[1])
            is_kept = is_kept.to(device)
            whole[is_kept] = hidden
            whole[~is_kept] = self._below(partial(self._model.base_model, **_only(kwargs, ~is_kept, missing)))
            hidden = whole
        # The rows make one block, which is filled up at its end.
        self._given = functional.pad(hidden, (0, 0, 0, kwargs["rows"].num_tokens - len(hidden)))

    def _give(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The input of the first layer that trains: what is kept, if anything."""
        if self._stops:
            raise _Reached(args[0][0])
        return None if self._given is None else (self._given[None], *args[1:])

    def _below(self, forward: Callable[[], object]) -> Tensor:
        """What the lower layers make of a batch (T, d)."""
        self._given, self._stops = None, True
        try:
            with torch.no_grad():
                forward()
        except _Reached as reached:
            return reached.hidden
        finally:
            self._stops = False
        raise AssertionError("the first layer that trains is in the model's way")

    def _store(self, hidden: Tensor) -> Tensor:
        """A copy of (T, d) on the CPU, in memory or mapped from the file."""
        hidden = hidden.cpu()
        if self._file is None:
            return hidden
        try:
            self._file.write(hidden.contiguous().view(torch.uint8).numpy().tobytes())
        except OSError as error:
            problem = f"{error.strerror} in {tempfile.gettempdir()}; TMPDIR names another folder"
            raise ConfigError("train.cache", self._kind, problem) from error
        # Copied on writing: torch wants memory that it could write to.
        mapped = np.memmap(self._file, np.uint8, "c", self.num_bytes, (hidden.nbytes,))
        return torch.from_numpy(mapped).view(hidden.dtype).view(hidden.shape)


class _Reached(Exception):  # noqa: N818
    """Not an error: the way out of a model at the first layer that trains."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _blocks(model: PreTrainedModel) -> nn.ModuleList | None:
    """The layers of a model, one after the other; None: it has fewer than it runs, as ALBERT has."""
    lists = (module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))
    return next((module for module in lists if len(module) == model.config.num_hidden_layers), None)


def _inputs(model: PreTrainedModel, blocks: nn.ModuleList, forward: Callable[[], object], seed: int) -> list[Tensor]:
    """What goes into each layer when a batch is trained on, with the dropout that `seed` draws."""
    found: list[Tensor] = []
    handles = [block.register_forward_pre_hook(lambda _, args: found.append(args[0])) for block in blocks]
    was_training = model.training
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.train()
        forward()
    model.train(was_training)
    for handle in handles:
        handle.remove()
    return found


def _texts(laid: Arguments) -> tuple[list[bytes], list[int]]:
    """(what a text is known by, its tokens) of each, in the order in which they lie end to end."""
    rows = laid["rows"]
    lengths = rows.lengths[rows.starts.argsort()].tolist()
    ids = torch.cat([laid[name][:, : sum(lengths)] for name in _IDS if name in laid]).cpu()
    keys = [
        hashlib.blake2b(part.numpy().tobytes(), digest_size=16).digest() for part in torch.split(ids, lengths, dim=1)
    ]
    return keys, lengths


def _only(laid: Arguments, chosen: Tensor, lengths: list[int]) -> Arguments:
    """A base model's arguments for some texts of those laid end to end: their tokens, and how many each has."""
    tokens = {name: laid[name][:, : len(chosen)][:, chosen] for name in (*_IDS, "position_ids") if name in laid}
    # They lie in order of length already.
    rows, _ = lay(torch.tensor(lengths), chosen.device)
    return {name: value for name, value in laid.items() if name != "logits_to_keep"} | tokens | {"rows": rows}
