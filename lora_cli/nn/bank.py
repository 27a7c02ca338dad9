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
from torch import nn

from lora_cli.errors import AdapterError, ConfigError, UnknownName
from lora_cli.nn.adapter import AdapterFile, inject_tensors, read_adapter, read_tensors
from lora_cli.nn.inject import Injection, adapted_layers, inject_plan
from lora_cli.nn.kinds import kind_of
from lora_cli.nn.layers import LoraLayer
from lora_cli.nn.mixing import Part, Slot
from lora_cli.nn.peft_tensors import stored_tensors
from lora_cli.nn.seats import Seating
from lora_cli.nn.targets import FULL, Plan, is_inside, plan_adapter
from lora_cli.nn.tokens import TokenRows
from lora_cli.nn.untrusted import where
from lora_cli.spec import LoraSpec

__all__ = ["Bank", "Member"]


@dataclass(frozen=True)
class Member:
    """One adapter of a bank."""

    model: nn.Module
    """The base with this adapter alone: a copy that shares the base's weights and this adapter's parameters."""
    injection: Injection
    """What was done to it."""


class Bank:
    """Adapters by name on `model`, which is frozen in place and may be without padding (`remove_padding`) already.

    `fresh` and `fingerprint` are the base's, as for `load_adapter`. One batch at a time: hooks belong to a model. For
    several, see `beside`.
    """

    def __init__(self, model: nn.Module, *, fresh: Sequence[str] = (), fingerprint: str | None = None) -> None:
        if adapted_layers(model):
            raise AdapterError("the model is adapted already; a bank needs the base alone")
        self.model = model.requires_grad_(False)
        self._fresh, self._fingerprint = tuple(fresh), fingerprint
        self._parts: dict[str, dict[str, Part]] = {}
        """Adapter → name of a module → what computes it for this adapter."""
        self._bytes: dict[str, int] = {}
        self._called: set[str] = set()
        """Modules that are known to be called by the model, which might read their weight instead."""
        self._last: tuple[list[dict[str, Part]], dict[str, Slot]] = ([], {})
        self._is_busy = False

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order in which they came."""
        return tuple(self._parts)

    @property
    def bytes(self) -> Mapping[str, int]:
        """Adapter → what it takes in memory beside the base."""
        return dict(self._bytes)

    def beside(self) -> Bank:
        """A bank of the same adapters, later ones too, on a copy of the model that shares its tensors: while one thread
        computes a batch in it, another may do so in this one, or let adapters come and go that are in neither batch.
        """
        bank = Bank(self._copied(), fresh=self._fresh, fingerprint=self._fingerprint)
        bank._parts, bank._bytes = self._parts, self._bytes
        return bank

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
        self._last = ([], {})

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
        for name in names:
            if name is not None:
                self._check_known(name)
        # At once: meanwhile another bank's thread may add one.
        asked = set(names)
        used = tuple(name for name in tuple(self._parts) if name in asked)
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
        yield self.model.register_forward_pre_hook(seating.gather, with_kwargs=True, prepend=True)
        yield self.model.register_forward_pre_hook(seating.watch, with_kwargs=True)
        for name, slot in self._slots(used).items():
            slot.start(seating, is_training=self.model.training)
            module = self.model.get_submodule(name)
            yield module.register_forward_pre_hook(slot.begin)
            yield module.register_forward_hook(slot.answer, with_kwargs=True)
            if name not in self._called:
                parent = self.model.get_submodule(name.rpartition(".")[0])
                yield parent.register_forward_hook(lambda *_, slot=slot: self._check_called(slot))

    def _check_called(self, slot: Slot) -> None:
        if not slot.was_called:
            raise AdapterError(
                f"{slot.name}: the model reads its weight and never calls it, so rows cannot differ there"
            )
        self._called.add(slot.name)

    def _slots(self, used: tuple[str, ...]) -> dict[str, Slot]:
        """What the adapters do to each module; kept for the next batch, which mostly has the same adapters."""
        parts, known = [self._parts[adapter] for adapter in used], self._last[0]
        # The same ones, not only of the same name: a bank beside this one may have let one go and taken another.
        if len(parts) != len(known) or any(own is not other for own, other in zip(parts, known, strict=True)):
            touched = dict.fromkeys(name for own in parts for name in own)
            slots = {
                name: Slot(name, {number: own[name] for number, own in enumerate(parts) if name in own})
                for name in touched
            }
            self._last = parts, slots
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
        # A parameter made in inference mode could not be trained, and does not count how often it was written to.
        with torch.inference_mode(False):
            yield self._copied()

    def _copied(self) -> nn.Module:
        shared = [*self.model.parameters(), *self.model.buffers()]
        return copy.deepcopy(self.model, {id(tensor): tensor for tensor in shared})

    def _take(self, name: str, twin: nn.Module, plan: Plan, injection: Injection) -> Member:
        shared = {id(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())}
        own = {id(t): t.nbytes for t in (*twin.parameters(), *twin.buffers()) if id(t) not in shared}
        self._parts[name] = dict(_parts(twin, plan, own.keys()))
        self._bytes[name] = sum(own.values())
        return Member(twin.train(self.model.training), injection)


def _parts(twin: nn.Module, plan: Plan, own: Collection[int]) -> Iterator[tuple[str, Part]]:
    """The outermost modules of `twin` that compute something else than the base's; `own` are ids of its own tensors."""
    last = None
    for name, module in twin.named_modules():
        if last is not None and name.startswith(f"{last}."):
            continue
        is_layer = isinstance(module, LoraLayer | TokenRows)
        if is_layer or name in plan.whole or any(id(p) in own for p in module.parameters(recurse=False)):
            last = name
            base = module.base_layer if is_layer else module
            yield name, Part.of(module, is_beside=is_layer and not any(id(p) in own for p in base.parameters()))


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
