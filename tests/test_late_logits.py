"""Logits computed part by part: the same losses and gradients, and never all of them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from lora_cli.engine.evaluate import forward
from lora_cli.late_logits import LateLogits, can_wait, make_logits_late, tokens_at_once
from lora_cli.nn import inject
from lora_cli.spec import LoraSpec
from lora_cli.tasks.generation import _loss
from lora_cli.unpadded import remove_padding
from nn.models import LM_CONFIGS, tiny_lm, trained
from test_unpadded import batch

FAMILIES = tuple(name for name in LM_CONFIGS if can_wait(tiny_lm(name)))
LENGTHS = [7, 3, 12, 9]


def learnt(model: torch.nn.Module, inputs: dict[str, Tensor], *, smoothing: float = 0.0, **how: bool) -> list[Tensor]:
    """A step's loss, and the gradients of all that trains."""
    model.zero_grad()
    loss = _loss(forward(model, inputs, **how), inputs, smoothing)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def texts(model: torch.nn.Module) -> dict[str, Tensor]:
    inputs = batch(LENGTHS, 0)
    inputs["labels"] = torch.where(inputs["attention_mask"] > 0, inputs["input_ids"], -100)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"].roll(1, 1)
    return inputs


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_all_at_once(family: str, packed: bool, smoothing: float) -> None:
    model = tiny_lm(family, vocab_size=100)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias += torch.linspace(-1, 1, 100)
    if packed and not remove_padding(model):
        pytest.skip("pads always")
    inputs = texts(model)
    whole = learnt(model, inputs, smoothing=smoothing)
    make_logits_late(model, "4")
    widest: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: widest.append(out.numel()))
    torch.testing.assert_close(learnt(model, inputs, smoothing=smoothing, for_loss=True), whole, rtol=1e-6, atol=1e-5)
    # The first time it gives back what it is given.
    assert len(widest) > 4
    assert max(widest[1:]) <= 4 * 100


def test_the_output_layer_computes_afterwards_as_before() -> None:
    model = tiny_lm("llama", vocab_size=100)
    head = model.get_output_embeddings()
    head.forward = own = partial(type(head).forward, head)
    make_logits_late(model, "4")
    forward(model, texts(model), for_loss=True)
    assert head.forward is own


@pytest.mark.parametrize("targets", [["q_proj"], ["lm_head"]])
def test_an_adapter_learns_the_same_in_the_output_layer_too(targets: list[str]) -> None:
    model = tiny_lm("llama", vocab_size=100)
    inject(model, LoraSpec(r=2, targets=targets), groups={}, seed=0)
    inputs = texts(trained(model))
    whole = learnt(model, inputs)
    make_logits_late(model, "4")
    torch.testing.assert_close(learnt(model, inputs, for_loss=True), whole, rtol=1e-6, atol=1e-5)


def test_a_call_that_fails_and_calls_of_others_leave_the_model_as_it_was() -> None:
    model = tiny_lm("bart", vocab_size=100)
    inputs = texts(model)
    before = forward(model, inputs)
    make_logits_late(model, "4")
    assert isinstance(forward(model, inputs, for_loss=True), LateLogits)
    with pytest.raises(IndexError):
        forward(model, inputs | {"input_ids": inputs["input_ids"] + 90}, for_loss=True)
    assert torch.equal(forward(model, inputs), before)
    few = {name: value[:1, :3] for name, value in inputs.items()}
    assert isinstance(forward(model, few, for_loss=True), Tensor), "no more than are at once"


def test_logits_that_are_capped_or_made_in_an_unknown_way_do_not_wait() -> None:
    assert not can_wait(tiny_lm("gemma2"))
    unknown = tiny_lm("llama")
    unknown.config.model_type = "unheard_of"
    assert not can_wait(unknown)


def test_auto_is_as_many_tokens_as_take_128_mib() -> None:
    assert tokens_at_once("auto", 49_152) == 682
    assert tokens_at_once("300", 49_152) == 300
