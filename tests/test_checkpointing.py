"""Layers computed again in the backward pass: the same losses and gradients, and less is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_cli.checkpointing import checkpoint_layers, forgo_cache
from lora_cli.dropout import quicken
from lora_cli.errors import ConfigError
from lora_cli.nn import inject
from lora_cli.spec import LoraSpec
from lora_cli.unpadded import remove_padding
from nn.models import tiny_lm, trained
from test_unpadded import LENGTHS, batch, build

ENCODERS = ("tiny-bert", "tiny-distilbert", "tiny-modernbert", "tiny-deberta-v2")
DECODERS = ("gpt2", "llama", "opt", "bloom", "t5")


def learnt(model: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor], int]:
    """A step's loss and gradients, and the bytes that its backward pass was left with."""
    kept: dict[int, int] = {}
    model.zero_grad()
    torch.manual_seed(5)

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs).logits.square().mean()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None], sum(kept.values())


def check_same(model: torch.nn.Module, inputs: dict[str, Tensor]) -> None:
    forgo_cache(model)
    quicken(model.train())
    loss, gradients, kept = learnt(model, inputs)
    checkpoint_layers(model, "")
    again, same, less = learnt(model, inputs)
    # What the decoder asks of the encoder is summed layer by layer.
    tolerance = 1e-6 if model.config.is_encoder_decoder else 0.0
    torch.testing.assert_close(again, loss, rtol=0.0, atol=0.0)
    torch.testing.assert_close(same, gradients, rtol=tolerance, atol=tolerance)
    assert less < kept


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_learns_the_same_to_the_last_bit(name: str, dropout: float) -> None:
    changes = dict.fromkeys(("hidden_dropout_prob", "dropout", "attention_dropout", "mlp_dropout"), dropout)
    model = build(name, **changes)
    if name != "tiny-deberta-v2":
        assert remove_padding(model)
    check_same(model, batch(LENGTHS, model.config.pad_token_id))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", DECODERS)
def test_a_writing_model_learns_the_same(family: str, packed: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_lm(family, vocab_size=100)
    inputs = batch([5, 9, 3], 0)
    if packed and not remove_padding(model):
        pytest.skip("pads always")
    if packed:
        inputs["labels"] = torch.where(inputs["attention_mask"] > 0, inputs["input_ids"], -100)
    if family == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    check_same(model, inputs)
    assert capsys.readouterr() == ("", "")


def test_an_adapter_of_one_rank_drawn_for_all_layers_draws_it_once() -> None:
    model = build("tiny-bert")
    inject(model, LoraSpec(variant="dylora", r=8, dropout=0.2, targets=["query", "value"]), groups={}, seed=0)
    check_same(trained(model), batch(LENGTHS, model.config.pad_token_id))


def test_one_layer_that_runs_many_times_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"train.checkpointing.*albert"):
        checkpoint_layers(build("tiny-albert"), "albert")


def test_a_model_that_forgoes_its_cache_makes_none_unless_asked() -> None:
    model = tiny_lm("t5", vocab_size=100)
    forgo_cache(model)
    inputs = {"input_ids": torch.ones(1, 3, dtype=torch.long), "decoder_input_ids": torch.ones(1, 2, dtype=torch.long)}
    assert model(**inputs).past_key_values is None
    assert model(**inputs, use_cache=True).past_key_values.get_seq_length() == 2
