"""Which precision is taken, and what is said about it. Devices that are not here: tests/gpu."""

from __future__ import annotations

import pytest
import torch

from lora_cli.engine.device import open_device
from lora_cli.spec import DeviceSpec


@pytest.fixture(params=[True, False], ids=["bf16 in the processor", "none"])
def is_fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor computes in bf16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return bool(request.param)


def test_a_processor_stays_exact_unless_asked_and_says_what_it_could(is_fast: bool) -> None:
    device = open_device(DeviceSpec(name="cpu"))
    assert device.precision == "fp32"
    assert device.reason == ("auto: exact; bf16 is faster on this cpu" if is_fast else "auto: no fast bf16 on this cpu")


def test_bf16_that_is_slow_is_said_to_be(is_fast: bool) -> None:
    device = open_device(DeviceSpec(name="cpu", precision="bf16"))
    assert device.precision == "bf16"
    assert device.reason == ("as asked" if is_fast else "as asked, though slow on this cpu")


def test_a_torch_that_does_not_tell_is_taken_at_its_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert open_device(DeviceSpec(name="cpu")).reason == "auto: no fast bf16 on this cpu"
