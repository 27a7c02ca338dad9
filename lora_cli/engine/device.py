"""The machine: which device, which precision, its random numbers and its memory. The only file that says cuda."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch

from lora_cli.engine.distributed import ALONE, World, join, local
from lora_cli.engine.offload import saved_on_host
from lora_cli.errors import ConfigError
from lora_cli.machine import compiler, processors
from lora_cli.spec import DeviceSpec, TrainDeviceSpec

__all__ = ["Card", "Device", "Hardware", "hardware", "lacks_compiler", "one_card", "open_device", "unless_full"]

T = TypeVar("T")
_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Device:
    """A torch device with the precision computed in. Trained weights are fp32 whatever the precision."""

    device: torch.device
    precision: str
    reason: str
    offload_activations: bool = False
    world: World = ALONE
    """The processes that train together."""
    compiles: bool = False
    """Whether forward passes are to be compiled."""
    prepack_mib: int = 0
    """MiB for copies of weights, see `prepacked`."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the frozen base weights and of the computation."""
        return _DTYPES[self.precision]

    @property
    def is_exact(self) -> bool:
        """Whether products have all digits of fp32."""
        return self.precision == "fp32"

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Compute in `dtype`; nothing at fp32 and tf32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def without_gradients(self) -> contextlib.AbstractContextManager[object]:
        """Compute, and keep nothing for a backward pass."""
        # Weights that are put together within inference mode could not be trained through later.
        return torch.no_grad() if self.world.is_sharded else torch.inference_mode()

    def saving(self) -> contextlib.AbstractContextManager[None]:
        """Within it a forward pass leaves for the backward one what it needs, in the host's memory if that is asked."""
        return saved_on_host(self.device) if self.offload_activations else contextlib.nullcontext()

    @property
    def can_page(self) -> bool:
        """Whether its memory can overflow into the host's."""
        return self.device.type == "cuda"

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for fp16, whose gradients would underflow; a pass-through otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def move(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch on this device; copies to a GPU overlap with its work."""
        if self.device.type == "cpu":
            return dict(batch)
        pinned = self.device.type == "cuda"
        return {
            name: (value.pin_memory() if pinned else value).to(self.device, non_blocking=pinned)
            for name, value in batch.items()
        }

    def seed(self, *numbers: int) -> None:
        """Seed torch from several numbers, so that what is drawn depends on them and on nothing before."""
        digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    @property
    def generator(self) -> torch.Generator:
        """What dropout draws from."""
        if self.device.type == "cuda":
            return torch.cuda.default_generators[self.device.index or torch.cuda.current_device()]
        return torch.mps._get_default_mps_generator() if self.device.type == "mps" else torch.default_generator

    def peak_memory_mib(self) -> float:
        """Peak memory so far: the GPU's allocated bytes, or the process's resident set on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

    def resident_memory(self) -> int:
        """Bytes that this process holds now; where nobody tells, at most."""
        statm = Path("/proc/self/statm")
        if self.can_page or not statm.exists():
            return round(self.peak_memory_mib() * 2**20)
        return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def free_memory(self) -> int | None:
        """Bytes of its memory that this process has or may still have; None: it has none of its own."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def numbers(self) -> str:
        """What the last digits of its numbers depend on, beginning with what others depend on as well."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        is_alone_on_cpu = self.device.type == "cpu" and self.world.size == 1
        return f"{name}, {self.precision}{_threads() if is_alone_on_cpu else ''}{', compiled' * self.compiles}"

    def __str__(self) -> str:
        if self.world.size == 1:
            return self.numbers
        each = f"{_threads()} each" if self.device.type == "cpu" else ""
        split = ", frozen weights split over them" if self.world.is_sharded else ""
        return f"{self.numbers}, {self.world.size} processes{each.replace(',', ' of', 1)}{split}"


@dataclass(frozen=True)
class Card:
    """A GPU that torch sees."""

    name: str
    memory_bytes: int
    has_bf16: bool


@dataclass(frozen=True)
class Hardware:
    """What torch can compute on here."""

    build: str
    """What this torch was built for."""
    threads: int
    vectors: str
    """The processor's instructions that it uses, such as AVX2."""
    cards: tuple[Card, ...]
    has_mps: bool

    @property
    def lacks_its_card(self) -> bool:
        """Whether torch was built for GPUs and sees none."""
        return self.build != "CPU" and not self.cards and not self.has_mps


def hardware() -> Hardware:
    """Look for it; nothing is allocated."""
    cards = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(number)
        has_bf16 = found.major >= 8 or torch.version.hip is not None
        cards.append(Card(found.name, found.total_memory, has_bf16))
    has_mps = torch.backends.mps.is_available()
    cuda, hip = torch.version.cuda, torch.version.hip
    build = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "MPS" if torch.backends.mps.is_built() else "CPU"
    vectors = torch.backends.cpu.get_cpu_capability()
    return Hardware(build, torch.get_num_threads(), vectors, tuple(cards), has_mps)


def one_card(number: int) -> dict[str, str]:
    """Environment by which a process to come sees one GPU only, the `number`-th and round again; {} without any."""
    if not torch.cuda.is_available():
        return {}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = seen.split(",") if seen else [str(card) for card in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": cards[number % len(cards)]}


def unless_full(work: Callable[[], T]) -> T | None:
    """What `work` returns; None: a GPU's memory ran out meanwhile, and is free again."""
    try:
        return work()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def open_device(spec: DeviceSpec) -> Device:
    """The device and precision that `spec` asks for.

    Raises:
        ConfigError: the device is not on this machine, or cannot compute in the precision.
    """
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(n for n, there in present.items() if there) if spec.name == "auto" else spec.name
    if not present[name]:
        here = ", ".join(n for n, there in present.items() if there)
        raise ConfigError("device", name, f"not on this machine, which has: {here}")
    device = torch.device(name)
    number, count = local()
    if name == "cuda" and count > 1:
        device = torch.device(name, number)
        torch.cuda.set_device(device)
    if name == "cpu" and count > 1 and spec.threads is None:
        torch.set_num_threads(max(1, processors() // count))
    asked = spec if isinstance(spec, TrainDeviceSpec) else TrainDeviceSpec()
    for key, wanted in (("activations", asked.offload_activations), ("base", asked.offload_base)):
        if wanted and name != "cuda":
            raise ConfigError(f"device.offload_{key}", "true", f"not on {name}, whose memory is the host's")
    precision, reason = _precision(spec.precision, name)
    if name == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    world = join(device, shard=asked.shard)
    compiles = asked.compile and lacks_compiler(name) is None
    # Weights that are split come and go, and a compiler lays them out itself.
    copies = name == "cpu" and precision == "fp32" and not (world.is_sharded or compiles)
    prepack_mib = spec.prepack_mib if copies else 0
    return Device(device, precision, reason, asked.offload_activations, world, compiles, prepack_mib)


def lacks_compiler(name: str) -> str | None:
    """What torch.compile wants on a device called `name` and does not find; None: it has all."""
    if name == "cuda":
        return None if find_spec("triton") else "Triton is not installed"
    return None if compiler() else "there is no C++ compiler"


def _precision(asked: str, name: str) -> tuple[str, str]:
    """(what is computed in on the device called `name`, why)."""
    has_bf16 = name == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "auto" and has_bf16:
        return "bf16", "auto: the GPU has bf16"
    if asked == "auto":
        is_fast = name == "cpu" and _computes_in_bf16()
        return "fp32", "auto: exact; bf16 is faster on this cpu" if is_fast else f"auto: no fast bf16 on this {name}"
    if asked in ("fp16", "tf32") and name != "cuda":
        raise ConfigError("device.precision", asked, f"not on {name}; bf16 or fp32")
    # Cards have had both since the same generation.
    if asked == "tf32" and not has_bf16:
        raise ConfigError("device.precision", "tf32", "not on this GPU, which is too old for it; fp32 or fp16")
    is_slow = asked == "bf16" and name == "cpu" and not _computes_in_bf16()
    return asked, "as asked, though slow on this cpu" if is_slow else "as asked"


def _computes_in_bf16() -> bool:
    """Whether the processor has instructions for products in bf16; False where torch does not tell."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def _threads() -> str:
    number = torch.get_num_threads()
    return f", {number} thread{'s' * (number != 1)}"
