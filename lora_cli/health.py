"""What this environment lets one do, and how to mend what it does not: findings for `lora doctor`.

torch is imported to see that it can be, and what it computes on; no model and no data is touched, and no token read.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli import __version__, hub, machine
from lora_cli.errors import UserError, listed, printable

if TYPE_CHECKING:
    from packaging.requirements import Requirement

__all__ = ["EXTRAS", "NOTE", "OK", "PROBLEM", "Finding", "examine"]

OK, NOTE, PROBLEM = "ok", "note", "problem"
"""All is well; something is not there that some commands want; something does not work."""
EXTRAS = {
    "demo": "the weights of model=minilm without a hub",
    "quant": "model.quantization, lora=qlora",
    "tensorboard": "tracker=tensorboard",
    "wandb": "tracker=wandb",
    "mlflow": "tracker=mlflow",
    "optuna": "hydra/sweeper=optuna",
    "gguf": "lora export target=llamacpp",
    "onnx": "lora export target=onnx",
    "serve": "lora serve",
}
"""Extra of this package → what it is for."""
_PACKAGE = "lora-cli"
_TIGHT = 5 * 2**30
"""Bytes of disk or memory below which many models do not fit."""
_SHOWN = 60
"""Characters of a list of names in one finding."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: str
    """ok, note or problem."""
    text: str
    mend: str = ""
    """What to do about it, as a command where there is one."""
    stops_training: bool = False
    """Whether nothing can be trained before it is mended."""


def examine() -> Iterator[Finding]:
    """Look at everything, the most basic things first."""
    yield Finding("python", OK, f"{platform.python_version()}, {platform.platform(terse=True)}, lora {__version__}")
    yield from _libraries()
    yield from _torch()
    yield _processors()
    yield from _disks()
    yield from _hub()
    yield _mirror()
    yield from _extras()


def _libraries() -> Iterator[Finding]:
    """Needed packages beside what this package asks for, and beside the versions that its tests ran with."""
    needed = [each for each in _requirements() if each.marker is None or each.marker.evaluate({"extra": ""})]
    if not needed:
        text = "lora-cli is on the path but not installed, so what it needs is not known"
        yield Finding("libraries", NOTE, text, "pip install -e .")
        return
    for each in needed:
        found = _version(each.name)
        if found is None or not each.specifier.contains(found, prereleases=True):
            text = f"{each.name} {found or 'is not installed'}, needed is {each.specifier}"
            yield Finding("libraries", PROBLEM, text, f"pip install '{each.name}{each.specifier}'", stops_training=True)
    tested = _tested()
    others = [
        f"{each.name} {_version(each.name)} ({tested[each.name]})"
        for each in needed
        if each.name in tested and _base(_version(each.name)) != tested[each.name]
    ]
    if others:
        text = f"tested with other versions, in brackets: {listed(others, _SHOWN)}"
        yield Finding("libraries", NOTE, text, "pip install -c constraints.txt lora-cli")
    elif all(_version(each.name) for each in needed):
        also = ", as the tests ran with" if tested else ""
        yield Finding("libraries", OK, f"{len(needed)} needed packages are there{also}")


def _torch() -> Iterator[Finding]:
    """Whether torch starts, what it was built for, what it sees."""
    try:
        from lora_cli.engine.device import hardware
    # What a broken installation raises is of every kind.
    except Exception as error:
        text = f"cannot be imported: {printable(error, 200)}"
        yield Finding("torch", PROBLEM, text, "pip install --force-reinstall torch", stops_training=True)
        return
    found = hardware()
    threads = f"{found.threads} thread{'s' * (found.threads != 1)}"
    yield Finding("torch", OK, f"{version('torch')} for {found.build}, {threads}, {found.vectors}")
    if found.threads > machine.processors():
        text = f"{threads} on {machine.processors()} processors slow each other down"
        yield Finding("threads", NOTE, text, f"export OMP_NUM_THREADS={machine.processors()}")
    for card in found.cards:
        precision = "bf16" if card.has_bf16 else "no bf16: device.precision=auto computes in fp32, fp16 is faster"
        yield Finding("device", OK, f"{card.name}, {card.memory_bytes / 2**30:.1f} GiB, {precision}")
    if found.lacks_its_card:
        yield Finding("device", PROBLEM, f"torch is built for {found.build} but sees no GPU", "nvidia-smi, or rocm-smi")
    elif not found.cards:
        yield Finding("device", OK, "mps, fp32" if found.has_mps else "cpu, fp32; no GPU")
    if compiler := machine.compiler():
        yield Finding("compiler", OK, f"{compiler}, for torch.compile")
    else:
        yield Finding("compiler", NOTE, "no C++ compiler, which torch.compile wants", "apt-get install g++")


def _processors() -> Finding:
    memory, number = machine.memory(), machine.processors()
    text = f"{number} processors, {_gib(memory.available)} of {_gib(memory.total)} memory available"
    if memory.available < _TIGHT:
        return Finding("machine", NOTE, text, "end other programs; lora plan says what fits")
    return Finding("machine", OK, text)


def _disks() -> Iterator[Finding]:
    folder, free = machine.free_disk(Path("runs"))
    if not os.access(folder, os.W_OK | os.X_OK):
        mend = "cd to a folder of yours"
        yield Finding("runs", PROBLEM, f"{folder} may not be written, so there is no place for runs/", mend, True)
    elif free < _TIGHT:
        yield Finding("runs", NOTE, f"{_gib(free)} free at ./runs", "remove old runs: lora runs lists them")
    else:
        yield Finding("runs", OK, f"{_gib(free)} free at ./runs")


def _hub() -> Iterator[Finding]:
    found = hub.access()
    token = "a token is set" if found.has_token else "no token"
    if found.is_forbidden:
        text = "HF_HUB_OFFLINE is set: only what is in the mirror, the cache or a folder is found"
        yield Finding("hub", NOTE, text, "unset HF_HUB_OFFLINE")
    elif not found.is_reached:
        text = f"no connection to {found.host}: only what is in the mirror, the cache or a folder is found"
        mend = "export HTTPS_PROXY=..., or lora fetch where there is a network"
        yield Finding("hub", NOTE, text, mend)
    else:
        mend = "" if found.has_token else "hf auth login, for models that ask for leave"
        yield Finding("hub", OK, f"{found.host}, {token}", mend)
    _, free = machine.free_disk(found.cache)
    kept = f"{len(found.cached)} models and data sets" + (f" ({listed(found.cached, _SHOWN)})" if found.cached else "")
    mend = "export HF_HOME=... on a larger disk" if free < _TIGHT else ""
    yield Finding("hub cache", NOTE if mend else OK, f"{kept}, {_gib(free)} free at {found.cache}", mend)


def _mirror() -> Finding:
    try:
        found = hub.mirrored()
    except UserError as error:
        return Finding("mirror", PROBLEM, str(error), "unset LORA_HUB_ROOT")
    if found is None:
        return Finding("mirror", OK, "none: LORA_HUB_ROOT is not set")
    if not found:
        return Finding("mirror", NOTE, "LORA_HUB_ROOT holds no models/ or datasets/", "hf download --local-dir")
    models = [name.partition("/")[2] for name in found if name.startswith("models/")]
    tables = [name.partition("/")[2] for name in found if name.startswith("datasets/")]
    parts = [("models", models), ("data sets", tables)]
    return Finding("mirror", OK, "; ".join(f"{len(names)} {what}: {listed(names, _SHOWN)}" for what, names in parts))


def _extras() -> Iterator[Finding]:
    """What is there beyond what is needed, each with what it is for."""
    every = _requirements()
    for extra, purpose in EXTRAS.items():
        wanted = [each for each in every if each.marker is not None and each.marker.evaluate({"extra": extra})]
        wanted = [each for each in wanted if not each.marker.evaluate({"extra": ""})]  # type: ignore[union-attr]
        missing = [each.name for each in wanted if not _is_there(each)]
        if wanted and not missing:
            yield Finding(
                f"extra {extra}", OK, f"{purpose}: {', '.join(f'{e.name} {_version(e.name)}' for e in wanted)}"
            )
        elif wanted:
            text = f"{purpose}: without {', '.join(missing)}"
            yield Finding(f"extra {extra}", NOTE, text, f"pip install 'lora-cli[{extra}]'")


def _requirements() -> Sequence[Requirement]:
    from packaging.requirements import Requirement

    try:
        return [Requirement(line) for line in requires(_PACKAGE) or ()]
    except PackageNotFoundError:
        return []


def _is_there(wanted: Requirement) -> bool:
    found = _version(wanted.name)
    return found is not None and wanted.specifier.contains(found, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _tested() -> dict[str, str]:
    """Package → the version that the tests ran with; {} outside a checkout, where that is not known."""
    from packaging.requirements import Requirement

    file = Path(__file__).parents[1] / "constraints.txt"
    if not file.is_file():
        return {}
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    pins = [each for line in lines if (each := Requirement(line)).marker is None or each.marker.evaluate()]
    return {each.name: str(each.specifier).removeprefix("==") for each in pins}


def _base(found: str | None) -> str:
    """A version without what a build adds to it: 2.13.0+cpu → 2.13.0."""
    return (found or "").partition("+")[0]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"
