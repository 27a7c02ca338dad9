"""What waits in the host's memory, by its logic: where there is no GPU, both memories are the same."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn

from lora_cli.checkpointing import forgo_cache, layers_of
from lora_cli.engine.device import open_device
from lora_cli.engine.offload import Streamed, saved_on_host
from lora_cli.errors import ConfigError
from lora_cli.nn import inject
from lora_cli.spec import DeviceSpec, LoraSpec, TrainDeviceSpec
from nn.models import tiny_lm, trained

CPU = torch.device("cpu")
IDS = torch.arange(5, 65).view(4, 15)


def adapted(family: str = "llama") -> nn.Module:
    model = tiny_lm(family, vocab_size=100)
    forgo_cache(model)
    inject(model, LoraSpec(r=2, dropout=0.1, targets=["all-linear"]), groups={}, skip=("lm_head",), seed=0)
    return trained(model).train()


def learnt(model: nn.Module) -> list[Tensor]:
    """A step's loss and the gradients of all that trains."""
    model.zero_grad()
    torch.manual_seed(3)
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    loss = model(input_ids=IDS, **more).logits.square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_layers_whose_weights_come_and_go_learn_the_same(family: str) -> None:
    model = adapted(family)
    whole = learnt(model)
    Streamed(model, layers_of(model, family, key=""), CPU)
    torch.testing.assert_close(learnt(model), whole, rtol=1e-6, atol=1e-6)


def test_a_layer_has_copies_of_its_frozen_weights_while_it_is_computed_and_no_longer() -> None:
    model = adapted()
    layers = layers_of(model, "llama", key="")
    own = {id(p) for p in model.parameters()}
    Streamed(model, layers, CPU)
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def look(module: nn.Linear, args: object) -> None:
        assert id(module.weight) not in own, "a copy"
        alive.append(sum(each() is not None for each in seen))
        seen.append(weakref.ref(module.weight))

    for layer in layers:
        layer.mlp.down_proj.base_layer.register_forward_pre_hook(look)
    learnt(model)
    assert len(seen) == 2 * len(layers), "forward, and again in the backward pass"
    assert max(alive[: len(layers)]) == 0, "of one layer at a time"
    assert all(each() is None for each in seen)
    assert {id(p) for p in model.parameters()} == own


def test_what_trains_goes_to_the_device_and_what_is_frozen_in_layers_to_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted()
    inside = {id(p) for p in model.model.layers.parameters() if not p.requires_grad}
    sent: dict[bool, set[torch.device]] = {True: set(), False: set()}
    original = Tensor.to

    def to(tensor: Tensor, device: torch.device, **how: bool) -> Tensor:
        sent[id(tensor) in inside].add(device)
        return original(tensor, device, **how)

    monkeypatch.setattr(Tensor, "to", to)
    device = torch.device("cpu", 0)
    Streamed(model, layers_of(model, "llama", key=""), device)
    assert sent == {True: {CPU}, False: {device}}


def test_all_but_weights_and_small_change_is_put_away(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 1))
    x = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    same = copy.deepcopy(model)
    same(x).sum().backward()
    moved: list[tuple[int, ...]] = []
    original = Tensor.copy_
    monkeypatch.setattr(
        Tensor, "copy_", lambda to, tensor, *how: moved.append(tuple(to.shape)) or original(to, tensor, *how)
    )
    with saved_on_host(CPU):
        model(x).sum().backward()
    assert set(moved) == {(128, 256)}
    assert len(moved) == 5, "the inputs of three layers and of two functions"
    for found, wanted in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(found.grad, wanted.grad)


@pytest.mark.parametrize("key", ["offload_activations", "offload_base"])
def test_a_cpu_has_nowhere_to_put_things(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"device.{key}.*not on cpu"):
        open_device(TrainDeviceSpec(name="cpu", **{key: True}))


def test_tf32_is_for_gpus() -> None:
    with pytest.raises(ConfigError, match=r"device.precision.*tf32"):
        DeviceSpec(name="cpu", precision="tf32")
    with pytest.raises(ConfigError, match=r"device.precision.*tf32"):
        open_device(DeviceSpec(precision="tf32"))
