"""Activations as one operation give what the six of transformers give."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.activations import ACT2FN

from lora_cli.activations import join_operations
from nn.models import tiny_lm


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_values_and_gradients_are_the_same_up_to_rounding(name: str) -> None:
    x = torch.linspace(-9, 9, 2001, dtype=torch.float64, requires_grad=True)
    written_out, joined = copy.deepcopy(ACT2FN[name]), copy.deepcopy(ACT2FN[name])
    join_operations(joined)
    both = [activation(x) for activation in (written_out, joined)]
    # One of them rounds its constants to ten digits.
    torch.testing.assert_close(both[1], both[0], rtol=1e-9, atol=1e-10)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in both]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)


def test_a_model_computes_the_same_and_a_copy_of_it_too() -> None:
    model = tiny_lm("gpt2")
    ids = torch.arange(5, 25)[None]
    wanted = model(ids).logits
    join_operations(model)
    for each in (model, copy.deepcopy(model)):
        torch.testing.assert_close(each(ids).logits, wanted)
        assert each.transformer.h[0].mlp.act.forward.keywords == {"approximate": "tanh"}
