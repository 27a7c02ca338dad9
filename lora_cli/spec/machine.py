"""The machine: the keys of device.*."""

from __future__ import annotations

from dataclasses import dataclass

from lora_cli.errors import ConfigError
from lora_cli.spec.checks import at_least, one_of
from lora_cli.spec.names import DEVICES, PRECISIONS

__all__ = ["DeviceSpec", "ThreadsSpec", "TrainDeviceSpec"]


@dataclass(kw_only=True)
class DeviceSpec:
    """Where it runs."""

    name: str = "auto"
    """auto (CUDA, else MPS, else CPU), cpu, cuda or mps."""
    precision: str = "auto"
    """Compute dtype: auto (bf16 on a GPU that has it, else fp32), fp32, tf32 (fp32, with products of fewer digits; CUDA
    only), bf16 or fp16. Trained weights stay fp32."""
    threads: int | None = None
    """CPU threads; None: as torch finds best."""
    prepack_mib: int = 1024
    """MiB for copies of weights while text is written, laid out for products of few tokens; the first layers first.
    0: none, and products are by MKL alone. Only in fp32 on a CPU with AVX-512."""

    def __post_init__(self) -> None:
        one_of("device.name", self.name, DEVICES, "device")
        one_of("device.precision", self.precision, PRECISIONS, "precision")
        at_least("device.threads", self.threads, 1, optional=True)
        at_least("device.prepack_mib", self.prepack_mib, 0)
        if self.precision in ("fp16", "tf32") and self.name in ("cpu", "mps"):
            raise ConfigError("device.precision", self.precision, f"not on device.name={self.name}; bf16 or fp32")


@dataclass(kw_only=True)
class TrainDeviceSpec(DeviceSpec):
    """Where it trains: one process, or several that share every step's rows."""

    compile: bool = False
    """Compile the forward and backward pass (torch.compile), of training and its scorings; nothing where no compiler is
    at hand. Texts are padded to few lengths."""
    nproc: int = 1
    """Processes that train together on this machine; 0: one for each GPU. With torchrun its count holds."""
    shard: bool = False
    """Split the frozen weights over the processes (FSDP2), so that none holds more than one layer of them whole."""
    offload_activations: bool = False
    """Let what the backward pass needs wait in the host's memory; CUDA only."""
    offload_base: bool = False
    """Let the frozen weights of the layers wait in the host's memory. Without device.shard each layer is computed again
    in the backward pass, as with train.checkpointing. CUDA only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("device.nproc", self.nproc, 0)


@dataclass(kw_only=True)
class ThreadsSpec:
    """The machine, as far as it may be chosen for a training that goes on."""

    threads: int | None = None
    """CPU threads; None: as it was. With another number than before the run is refused: it would round differently."""
    nproc: int | None = None
    """Processes that train together; None: as it was. Another number rounds differently, and is taken all the same."""

    def __post_init__(self) -> None:
        at_least("device.threads", self.threads, 1, optional=True)
        at_least("device.nproc", self.nproc, 0, optional=True)
