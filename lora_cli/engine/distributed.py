"""Several processes that train one model: who does which part, and how the parts come together.

Each holds the adapter whole and does its part of every step; of the gradients only those of what trains travel, once a
step. The numbers are those of one process, up to the order in which sums are added: `train.batch_size` and
`train.accumulation` count rows over all of them, so a training can go on with more of them, or fewer.

The environment says which process this is, as torchrun has it: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE; and
LORA_MEETING, a file by which processes of one machine find each other where it is not torchrun that has started them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from lora_cli.errors import ConfigError, TrainingFailure

__all__ = ["ALONE", "Share", "World", "join", "leave", "local"]

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """What one process does of a step: the gradients of a few rows."""

    seed: tuple[int, ...]
    """Of their dropout, besides the step's."""
    rows: list[int]
    counts: bool = True
    """False: computed only because the others, who hold parts of the model, need this process meanwhile."""


@dataclass(frozen=True)
class World:
    """All processes of a training, as one of them sees them."""

    rank: int = 0
    size: int = 1
    is_sharded: bool = False
    """Whether the frozen weights are split over the processes, so that all have to compute whenever one does."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def of_step(self, window: Sequence[Sequence[int]], accumulation: int) -> list[Share]:
        """This process's part of a step, whose micro-batches are `window`; of `accumulation` in an unbroken epoch.

        Whole micro-batches where they can be shared out evenly: then dropout draws what it draws in one process.
        Else each process has rows of all of them.
        """
        if accumulation % self.size == 0:
            shares = [Share((number,), list(rows)) for number, rows in enumerate(window)][self.rank :: self.size]
            wanted = math.ceil(len(window) / self.size)
        else:
            parts = ((number, list(rows[self.rank :: self.size])) for number, rows in enumerate(window))
            shares = [Share((number, self.rank), rows) for number, rows in parts if rows]
            wanted = len(window)
        idle = wanted - len(shares) if self.is_sharded else 0
        return shares + [Share((0,), [window[0][0]], counts=False)] * idle

    def own(self, items: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """This process's part of `items`, of which the first is the longest to do, and whether its result counts."""
        for start in range(0, len(items), self.size):
            mine = start + self.rank
            if mine < len(items):
                yield items[mine], True
            elif self.is_sharded:
                yield items[-1], False

    def gathered(self, value: T) -> list[T]:
        """The `value` of each process, in the order of their ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _told():
            dist.all_gather_object(found, value)
        return found

    def from_first(self, value: T) -> T:
        """The first process's `value`."""
        if self.size == 1:
            return value
        found: list[Any] = [value]
        with _told():
            dist.broadcast_object_list(found, src=0)
        result: T = found[0]
        return result

    def sums(self, *numbers: float, device: torch.device) -> list[float]:
        """Each number added up over all processes."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        with _told():
            dist.all_reduce(total)
        return total.tolist()

    def add_up(self, parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        """Give every process the sum of all processes' gradients, and return that of `loss`. One message does it."""
        if self.size == 1:
            return loss
        has_gradient = loss.new_tensor([parameter.grad is not None for parameter in parameters])
        parts = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([loss.reshape(1), has_gradient, *(part.reshape(-1) for part in parts)])
        with _told():
            dist.all_reduce(flat)
        total, present, *summed = torch.split(flat, [1, len(parameters), *(part.numel() for part in parts)])
        for parameter, part, someone_has in zip(parameters, summed, present.tolist(), strict=True):
            parameter.grad = part.view(parameter.shape) if someone_has else None
        return total[0]

    def agree(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See that every process has the same `tensors`, to the bit.

        Raises:
            TrainingFailure: they have drifted apart.
        """
        # Of numbers that are equal to the bit the sum is, too.
        sums = [float(value.double().sum()) for value in tensors.values()] if self.size > 1 else []
        for rank, theirs in enumerate(self.gathered(sums)):
            if theirs != sums:
                names = [name for name, one, other in zip(tensors, sums, theirs, strict=True) if one != other]
                raise TrainingFailure(
                    f"self-check: processes {self.rank} and {rank} have different values of {names[0]}"
                )

    def share_out(
        self, model: torch.nn.Module, trained: Iterable[str], device: torch.device, *, offload: bool = False
    ) -> None:
        """Split the frozen weights of `model` over the processes, if that is wanted (FSDP2, `fully_shard`).

        Each layer is whole in a process only while it is computed. The submodules `trained` stay whole, and where they
        are; what is split goes to `device`, layer by layer, with `offload` only for its layer's turn.
        """
        if not self.is_sharded:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        whole = {p for name in trained for p in model.get_submodule(name).parameters()}
        for parameter in model.parameters():
            # Before it is split: later it would not reach the copies that layers are put together in.
            parameter.requires_grad_(parameter in whole)
        mesh = init_device_mesh(device.type, (self.size,))
        where = CPUOffloadPolicy(pin_memory=device.type != "cpu") if offload else OffloadPolicy()
        for layer in _layers(model):
            fully_shard(layer, mesh=mesh, ignored_params=whole, offload_policy=where)
        fully_shard(model, mesh=mesh, ignored_params=whole, offload_policy=where)


def _layers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The outermost modules that stand in lists: encoder's and decoder's layers, not what these are made of."""
    for module in model.children():
        if isinstance(module, torch.nn.ModuleList):
            yield from module
        else:
            yield from _layers(module)


ALONE = World()
"""One process."""


def local() -> tuple[int, int]:
    """Which of the processes on this machine this one is, and how many there are."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def join(device: torch.device, *, shard: bool) -> World:
    """Meet the other processes that the environment speaks of; at once if that is done already.

    Raises:
        ConfigError: not with this kind of device.
        TrainingFailure: they did not come.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    if device.type == "mps":
        raise ConfigError("device", "mps", "has one GPU, which several processes cannot share")
    if not dist.is_initialized():
        backend = dist.get_default_backend_for_device(device)
        meeting = os.environ.get("LORA_MEETING")
        how: dict[str, Any] = {"init_method": f"file://{meeting}"} if meeting else {}
        with _told():
            dist.init_process_group(
                # What is no tensor travels by the processors.
                backend if device.type == "cpu" else f"cpu:gloo,{device.type}:{backend}",
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                device_id=None if device.type == "cpu" else device,
                **how,
            )
    return World(dist.get_rank(), dist.get_world_size(), is_sharded=shard)


def leave() -> None:
    """Part from the others, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _told() -> Iterator[None]:
    """A message that does not come through means that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        gone = "another process of this training has ended, or cannot be reached"
        raise TrainingFailure(f"{gone}; lora resume goes on from the newest checkpoint") from error
