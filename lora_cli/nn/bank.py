"""Many adapters on one frozen base, each row of a batch its own. Knows torch and adapters; not requests nor sweeps.

An adapter of a bank lives in a copy of the base that shares the base's weights: what loads, trains, merges and saves
any adapter does so there. The base itself is left as it is, but for the hooks of a batch, inside `Bank.rows`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_cli.errors import AdapterError, ConfigError, UnknownName
from lora_cli.nn.adapter import AdapterFile, inject_tensors, read_adapter, read_tensors
from lora_cli.nn.inject import Injection, adapted_layers, inject_plan
from lora_cli.nn.kinds import kind_of
from lora_cli.nn.layers import LoraLayer
from lora_cli.nn.peft_tensors import stored_tensors
from lora_cli.nn.seats import Seating, Seats
from lora_cli.nn.targets import FULL, Plan, is_inside, plan_adapter
from lora_cli.nn.tokens import TokenRows
from lora_cli.nn.untrusted import where
from lora_cli.spec import LoraSpec

__all__ = ["Bank", "Member"]

_TOGETHER = 8_000_000
"""Up to this many multiplications the adapters of a batch are computed as one.

One product over all of them, of which each row keeps its own block, grows with their number; one after the other they
do not, but each takes four calls. For MiniLM (384) and r 8, on one core: 8 adapters on 32 tokens took 0.80 of the time
together, on 384 tokens 1.15; 32 adapters 1.1 on 32 tokens, 3.5 on 384.
"""


@dataclass(frozen=True)
class Member:
    """One adapter of a bank."""

    model: nn.Module
    """The base with this adapter alone: a copy that shares the base's weights and this adapter's parameters."""
    injection: Injection
    """What was done to it."""


class Bank:
    """Adapters by name on `model`, which is frozen in place and may be without padding (`remove_padding`) already.

    `fresh` and `fingerprint` are the base's, as for `load_adapter`. One batch at a time: hooks belong to a model.
    """

    def __init__(self, model: nn.Module, *, fresh: Sequence[str] = (), fingerprint: str | None = None) -> None:
        if adapted_layers(model):
            raise AdapterError("the model is adapted already; a bank needs the base alone")
        self.model = model.requires_grad_(False)
        self._fresh, self._fingerprint = tuple(fresh), fingerprint
        self._parts: dict[str, dict[str, _Part]] = {}
        """Adapter → name of a module → what computes it for this adapter."""
        self._bytes: dict[str, int] = {}
        self._called: set[str] = set()
        """Modules that are known to be called by the model, which might read their weight instead."""
        self._last: tuple[tuple[str, ...], dict[str, _Slot]] = ((), {})
        self._is_busy = False

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order in which they came."""
        return tuple(self._parts)

    @property
    def bytes(self) -> Mapping[str, int]:
        """Adapter → what it takes in memory beside the base."""
        return dict(self._bytes)

    def add(self, name: str, source: Path | AdapterFile, *, force_base: bool = False) -> Member:
        """Load an adapter as `load_adapter` does, and call it `name`. Its head may have another number of outputs.

        Raises:
            AdapterError: as `load_adapter`; the name is taken; it is a whole model.
        """
        file = source if isinstance(source, AdapterFile) else read_adapter(source)
        if file.config.spec.variant == FULL:
            raise AdapterError(f"{where(file.folder)}: a model trained whole shares nothing with a base")
        with self._new(name) as twin:
            _fit_head(twin, file, self._fresh)
            plan, tensors = read_tensors(
                twin, file, fresh=self._fresh, fingerprint=self._fingerprint, force_base=force_base
            )
            _own(twin, plan, file.config.spec.bias)
            return self._take(name, twin, plan, inject_tensors(twin, plan, file.config.spec, tensors))

    def add_new(
        self,
        name: str,
        spec: LoraSpec,
        *,
        groups: Mapping[str, Sequence[str]],
        skip: Sequence[str] = (),
        new_rows: Sequence[int] = (),
        seed: int = 0,
    ) -> Member:
        """Make an adapter to be trained, as `inject` does, and call it `name`. Its head starts as the base's.

        Raises:
            AdapterError: the name is taken.
            ConfigError: as `inject`, or a variant that needs a model of its own.
        """
        if spec.variant in (FULL, "dylora"):
            raise ConfigError("lora.variant", spec.variant, "trains in a model of its own, not beside others")
        with self._new(name) as twin:
            plan = plan_adapter(twin, spec, groups=groups, fresh=self._fresh, skip=skip, new_rows=new_rows)
            _own(twin, plan, spec.bias)
            return self._take(name, twin, plan, inject_plan(twin, plan, spec, seed=seed))

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            UnknownName: there is none of this name.
        """
        self._check_known(name)
        del self._parts[name], self._bytes[name]
        self._last = ((), {})

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside, row i of every batch is computed with the adapter called names[i], None: with the base alone.

        All that goes through the model is: padded or not, `generate` with beams and returned sequences (which repeat
        rows), gradients to each adapter's parameters. What modules trained whole return has as many columns as the
        widest in the batch needs; a row's columns past its own are -inf.

        Raises:
            UnknownName: an adapter that is not there.
            AdapterError: in the forward pass: a batch of other rows, or one that the model cannot mix.
        """
        if self._is_busy or not names:
            why = "a batch is in this bank already; its rows have their adapters" if names else "a batch of no rows"
            raise AdapterError(why)
        used = tuple(dict.fromkeys(name for name in names if name is not None))
        for name in used:
            self._check_known(name)
        device = next(self.model.parameters()).device
        seating = Seating([-1 if name is None else used.index(name) for name in names], len(used), device)
        self._is_busy, handles = True, list(self._hooks(used, seating))
        try:
            yield
        finally:
            self._is_busy = False
            for handle in handles:
                handle.remove()

    def _hooks(self, used: tuple[str, ...], seating: Seating) -> Iterator[Any]:
        yield self.model.register_forward_pre_hook(seating.watch, with_kwargs=True)
        for name, slot in self._slots(used).items():
            slot.start(seating, is_training=self.model.training)
            module = self.model.get_submodule(name)
            yield module.register_forward_hook(slot.answer, with_kwargs=True)
            if name not in self._called:
                parent = self.model.get_submodule(name.rpartition(".")[0])
                yield parent.register_forward_hook(lambda *_, slot=slot: self._check_called(slot))

    def _check_called(self, slot: _Slot) -> None:
        if not slot.was_called:
            raise AdapterError(
                f"{slot.name}: the model reads its weight and never calls it, so rows cannot differ there"
            )
        self._called.add(slot.name)

    def _slots(self, used: tuple[str, ...]) -> dict[str, _Slot]:
        """What the adapters do to each module; kept for the next batch, which mostly has the same adapters."""
        if self._last[0] != used:
            touched = dict.fromkeys(name for adapter in used for name in self._parts[adapter])
            parts = [self._parts[adapter] for adapter in used]
            self._last = (
                used,
                {
                    name: _Slot(name, {number: own[name] for number, own in enumerate(parts) if name in own})
                    for name in touched
                },
            )
        return self._last[1]

    def _check_known(self, name: str) -> None:
        if name not in self._parts:
            raise UnknownName("adapter", name, self._parts, "adapter")

    @contextmanager
    def _new(self, name: str) -> Iterator[nn.Module]:
        """A copy of the base that shares all its tensors, to become the adapter called `name`."""
        if name in self._parts:
            raise AdapterError(f"there is an adapter called {name} already; remove it first")
        if self._is_busy:
            raise AdapterError("a batch is in this bank; add an adapter before or after")
        shared = [*self.model.parameters(), *self.model.buffers()]
        # A parameter made in inference mode could not be trained, and does not count how often it was written to.
        with torch.inference_mode(False):
            yield copy.deepcopy(self.model, {id(tensor): tensor for tensor in shared})

    def _take(self, name: str, twin: nn.Module, plan: Plan, injection: Injection) -> Member:
        shared = {id(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())}
        own = {id(t): t.nbytes for t in (*twin.parameters(), *twin.buffers()) if id(t) not in shared}
        self._parts[name] = dict(_parts(twin, plan, own.keys()))
        self._bytes[name] = sum(own.values())
        return Member(twin.train(self.model.training), injection)


@dataclass(frozen=True)
class _Part:
    """What computes one module for one adapter."""

    module: nn.Module
    is_beside: bool
    """Whether it starts from the base's output, as nothing inside it but A, B and the like is the adapter's own."""

    @property
    def layer(self) -> LoraLayer | None:
        """The layer that only adds s B A x, if it is one."""
        is_sum = self.is_beside and isinstance(self.module, LoraLayer) and self.module.pair() is not None
        return self.module if is_sum else None  # type: ignore[return-value]


class _Slot:
    """What the adapters of a batch do to one module's output. `parts`: number of an adapter → what computes it."""

    def __init__(self, name: str, parts: Mapping[int, _Part]) -> None:
        self.name, self._parts = name, parts
        self._layers = {number: part.layer for number, part in parts.items() if part.layer is not None}
        self._others = {number: part for number, part in parts.items() if number not in self._layers}
        self._rank = sum(len(_pair(layer)[0]) for layer in self._layers.values())
        self._stack: tuple[Any, _Stack] | None = None
        self.was_called = False

    def start(self, seating: Seating, *, is_training: bool) -> None:
        """A batch begins."""
        self._seating, self.was_called = seating, False
        for part in self._parts.values():
            if part.module.training != is_training:
                part.module.train(is_training)

    def answer(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor:
        """The module's forward hook."""
        self.was_called = True
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
        if len(layers) > 1 and work <= _TOGETHER and not drops:
            A, B, block = self._stacked()
            h = functional.linear(x, A.to(x.dtype))
            # Filled, not multiplied by zero: another adapter's infinity must not reach this row.
            h = h.masked_fill_(seats.outside(block, x.ndim), 0.0)
            return output.add_(functional.linear(h, B.to(h.dtype)))
        for number, layer in layers.items():
            if seats.has(number):
                A, B = _pair(layer)
                h = functional.linear(layer.dropout(seats.take(x, number)), A.to(x.dtype)) * layer.scaling
                output = seats.add(output, number, functional.linear(h, B.to(h.dtype)).to(output.dtype))
        return output

    def _stacked(self) -> _Stack:
        """All A, all s B, and the adapter of each rank; kept until one is written to, unless gradients are wanted."""
        parameters = [p for layer in self._layers.values() for p in layer.parameters(recurse=False)]
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        state = None if trains else [(p._version, p.data_ptr()) for p in parameters]
        if state is not None and self._stack is not None and self._stack[0] == state:
            return self._stack[1]
        pairs = {number: _pair(layer) for number, layer in self._layers.items()}
        numbers = torch.tensor([number for number, (A, _) in pairs.items() for _ in range(len(A))])
        stack = (
            torch.cat([A for A, _ in pairs.values()]),
            torch.cat([B * self._layers[number].scaling for number, (_, B) in pairs.items()], dim=1),
            numbers.to(parameters[0].device),
        )
        self._stack = None if state is None else (state, stack)
        return stack

    def _replaced(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor, seats: Seats) -> Tensor:
        """`output` with the rows of the other adapters computed by their own modules."""
        found = {}
        for number, part in self._others.items():
            if seats.has(number):
                own = [seats.take(x, number) for x in args]
                if part.is_beside:
                    assert isinstance(part.module, LoraLayer | TokenRows)
                    y = part.module.adapted(own[0], seats.take(output, number))
                else:
                    # Past its hooks: what they do to a batch, the base's have done.
                    y = part.module.forward(*own, **{key: seats.take(x, number) for key, x in kwargs.items()})
                found[number] = y.to(output.dtype)
        return seats.put(output, found)


_Stack = tuple[Tensor, Tensor, Tensor]


def _pair(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    pair = layer.pair()
    assert pair is not None, "others are computed by themselves"
    return pair


def _parts(twin: nn.Module, plan: Plan, own: Collection[int]) -> Iterator[tuple[str, _Part]]:
    """The outermost modules of `twin` that compute something else than the base's; `own` are ids of its own tensors."""
    last = None
    for name, module in twin.named_modules():
        if last is not None and name.startswith(f"{last}."):
            continue
        is_layer = isinstance(module, LoraLayer | TokenRows)
        if is_layer or name in plan.whole or any(id(p) in own for p in module.parameters(recurse=False)):
            last = name
            base = module.base_layer if is_layer else module
            yield name, _Part(module, is_layer and not any(id(p) in own for p in base.parameters()))


def _fit_head(twin: nn.Module, file: AdapterFile, fresh: Sequence[str]) -> None:
    """Give the last new layer of `twin` as many outputs as in the file: label sets differ."""
    layers = [name for name, module in twin.named_modules() if is_inside(name, fresh) and type(module) is nn.Linear]
    for stored in stored_tensors(twin, Plan({}, tuple(fresh)), replace(file.config.spec, bias="none")):
        entry = next((file.tensors[key] for key in stored.keys if key in file.tensors), None)
        if not layers or stored.parameter != f"{layers[-1]}.weight" or entry is None or len(entry.shape) != 2:
            continue
        head = twin.get_submodule(layers[-1])
        assert isinstance(head, nn.Linear)
        if entry.shape[0] != head.out_features and entry.shape[1] == head.in_features:
            # On no device, so that nothing is drawn, and then as memory alone: the file fills it.
            made = nn.Linear(head.in_features, entry.shape[0], head.bias is not None, "meta", head.weight.dtype)
            made = made.to_empty(device=head.weight.device)
            twin.set_submodule(layers[-1], made.train(head.training))


def _own(twin: nn.Module, plan: Plan, bias: str) -> None:
    """Give `twin` copies of what trains of the base's own parameters."""
    for name, module in twin.named_modules():
        biases = ["bias"] if bias == "all" or (bias == "lora_only" and name in plan.layers) else []
        names = [*module._parameters] if is_inside(name, plan.whole) else biases
        kept = {leaf: p for leaf, p in module._parameters.items() if leaf in names and p is not None}
        if kept and not kind_of(module):
            # A norm needs all its parameters in one dtype, that of those which train.
            kept = {leaf: p for leaf, p in module._parameters.items() if p is not None}
        for leaf, parameter in kept.items():
            module._parameters[leaf] = nn.Parameter(parameter.detach().clone())
