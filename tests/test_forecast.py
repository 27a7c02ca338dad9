"""What a training takes, by arithmetic, beside what its layers and its batches are known to need."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from lora_cli import traced
from lora_cli.errors import ModelError
from lora_cli.forecast import Load, forecast, largest_batch, lay_out, load_of, num_scorings, worst_batch
from lora_cli.models import load_base
from lora_cli.reader import load_reader
from lora_cli.spec import ClassificationSpec, LanguageModelingSpec, LoraSpec, ModelSpec, TrainRun, TrainSpec

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BERT = ModelSpec(name="tiny", family="bert", random=SMALL)
LLAMA = ModelSpec(name="tiny", family="llama", random={**SMALL, "vocab_size": 1000})
HEAD = {"num_outputs": 3, "labels": None, "problem": "classification"}
WRITING = {"num_outputs": 0, "labels": None, "problem": "generation"}
LOAD = Load(rows=4, length=16, targets=4, tokens=640, steps=10)
FULL = LoraSpec(variant="full", targets=[])
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}


@dataclass(frozen=True)
class Text:
    """An example of which only the length is known."""

    num_tokens: int


def train_run(model: ModelSpec = BERT, lora: LoraSpec | None = None, **train: Any) -> TrainRun:
    kind = ClassificationSpec if model.family == "bert" else LanguageModelingSpec
    return TrainRun(task=kind(name="x"), model=model, lora=lora or LoraSpec(), train=TrainSpec(**train))


def foretold(spec: TrainRun, load: Load = LOAD, *, half: bool = False):
    head = HEAD if isinstance(spec.task, ClassificationSpec) else WRITING
    return forecast(spec, lay_out(load_reader(spec.model, problem=head["problem"]), head), load, half=half)


def test_parameters_and_weights_are_those_of_the_real_model() -> None:
    found, model = foretold(train_run(lora=FULL)), load_base(BERT, **HEAD, seed=0).model
    real = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(each.numel() * each.element_size() for each in model.buffers())
    assert (found.frozen, found.adapter, found.whole) == (0, 0, real)
    assert found.weights == 4 * real + buffers
    assert (found.gradients, found.optimizer, found.copies) == (4 * real, 8 * real, 8 * real)


def test_an_adapter_its_head_and_the_frozen_rest_are_told_apart() -> None:
    found = foretold(train_run(lora=LoraSpec(r=4)))
    assert found.adapter == 2 * 2 * (4 * 32 + 32 * 4)
    assert found.whole == 3 * 32 + 3
    assert found.gradients == 4 * (found.adapter + found.whole)


def test_what_grows_with_the_batch_does_so_in_proportion_and_holds_no_weights() -> None:
    small, large = (foretold(train_run(lora=FULL), replace(LOAD, rows=rows)) for rows in (4, 12))
    # What is made of the positions alone does not grow.
    assert large.activations == pytest.approx(3 * small.activations, rel=0.01)
    assert small.fixed == large.fixed


def test_activations_are_what_autograd_keeps() -> None:
    found = foretold(train_run(lora=FULL))
    real = load_base(replace(BERT, dropout=0.0), **HEAD, seed=0).model.train()
    real.set_attn_implementation("eager")
    weights = {each.untyped_storage().data_ptr() for each in real.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights and tensor.shape[-2:] != (16, 16):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        real.base_model(input_ids=torch.zeros(4, 16, dtype=torch.long))
    expected = sum(each.untyped_storage().nbytes() for each in kept.values())
    assert found.activations == pytest.approx(expected, rel=0.25)


def test_full_fine_tuning_computes_half_as_much_again() -> None:
    frozen, full = foretold(train_run(lora=LoraSpec(targets=[]))), foretold(train_run(lora=FULL))
    assert full.operations == pytest.approx(1.5 * frozen.operations)
    twice = foretold(train_run(lora=FULL), replace(LOAD, tokens=2 * LOAD.tokens))
    assert twice.operations == 2 * full.operations


def test_sixteen_bits_halve_the_frozen_base_and_what_is_computed() -> None:
    wide, narrow = (foretold(train_run(), half=half) for half in (False, True))
    assert narrow.activations == wide.activations // 2
    assert wide.weights - narrow.weights == 2 * wide.frozen
    assert narrow.optimizer == wide.optimizer


def test_four_bits_shrink_linear_layers_but_no_embedding_and_no_head() -> None:
    plain = foretold(train_run())
    small = foretold(train_run(replace(BERT, quantization="nf4")))
    inside = 2 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 32
    assert small.weights == pytest.approx(plain.weights - inside * (32 - 4.127) / 8, rel=1e-3)


def test_logits_are_counted_where_words_are_predicted() -> None:
    assert foretold(train_run()).logits == 0
    assert foretold(train_run(LLAMA)).logits == 3 * 4 * LOAD.targets * 1000


def test_of_logits_that_are_computed_part_by_part_one_part_is_counted() -> None:
    assert foretold(train_run(LLAMA, logits_chunk="3")).logits == 3 * 4 * 3 * 1000
    large = replace(LOAD, targets=10**6)
    assert foretold(train_run(LLAMA), large).logits == pytest.approx(3 * 2**27, rel=0.01)
    assert foretold(train_run(LLAMA, logits_chunk="off"), large).logits == 3 * 4 * 10**6 * 1000


def test_layers_that_are_computed_again_leave_their_inputs_and_the_inside_of_one() -> None:
    deep = replace(BERT, random={**SMALL, "num_hidden_layers": 12})
    run, again = (
        TrainRun(task=ClassificationSpec(name="x"), model=deep, train=TrainSpec(checkpointing=on))
        for on in (False, True)
    )
    shallow = replace(run, model=replace(BERT, random={**SMALL, "num_hidden_layers": 11}))
    layer = foretold(run).activations - foretold(shallow).activations
    inputs = 12 * 4 * LOAD.rows * LOAD.length * 32
    found = foretold(again)
    assert found.activations == pytest.approx(foretold(run).activations - 11 * layer + inputs, rel=0.05)
    assert found.operations == pytest.approx(1.5 * foretold(run).operations)


def test_seventy_billion_parameters_need_no_memory_to_be_counted() -> None:
    shape = {"hidden_size": 8192, "num_hidden_layers": 2, "num_attention_heads": 64, "num_key_value_heads": 8}
    shape |= {"intermediate_size": 28672, "vocab_size": 32000}
    found = foretold(train_run(replace(LLAMA, random=shape)), half=True)
    assert found.frozen + found.adapter == pytest.approx(2 * 855.6e6 + 2 * 32000 * 8192, rel=1e-3)


def test_code_that_looks_at_values_is_refused_in_one_line(monkeypatch) -> None:
    monkeypatch.setattr("transformers.BertModel.forward", lambda self, input_ids: input_ids.sum().item())
    with pytest.raises(ModelError, match="bert: its code does not run without weights"):
        foretold(train_run())


@pytest.mark.parametrize(
    ("family", "shape", "num_passes"),
    [
        ("bert", {"num_hidden_layers": 7}, 2),
        ("llama", {"num_hidden_layers": 7}, 2),
        ("bloom", {"n_layer": 7, "n_head": 4}, 2),
        # Every sixth layer sees the whole text, the others a window.
        ("gemma3_text", {"num_hidden_layers": 7, "head_dim": 8}, 1),
        # Two stacks. Its feed-forward asks for the weight of what comes next.
        ("t5", {"num_layers": 8, "num_decoder_layers": 8, "decoder_start_token_id": 0, **T5}, 3),
    ],
)
@pytest.mark.parametrize("targets", [["all-linear"], [r"re:.*\.[67]\..*"]])
def test_layers_that_are_alike_are_traced_once_and_nothing_is_lost(
    monkeypatch, family: str, shape: dict[str, int], num_passes: int, targets: list[str]
) -> None:
    shape = (SMALL if "num_hidden_layers" in shape else {"hidden_size": 32} if family == "bloom" else {}) | shape
    model = ModelSpec(name="tiny", family=family, random=shape)
    lora = LoraSpec(targets=targets)
    passes, whole = [], traced._pass
    monkeypatch.setattr(traced, "_pass", lambda *args: passes.append(args) or whole(*args))
    few = foretold(train_run(model, lora))
    assert len(passes) == num_passes
    monkeypatch.setattr(traced, "_runs", lambda model: [])
    assert few == foretold(train_run(model, lora))


@pytest.mark.parametrize("variant", ["lora", "lora_fa", "dora", "dylora", "vera"])
def test_every_way_to_adapt_is_counted_without_weights(variant: str) -> None:
    assert foretold(train_run(lora=LoraSpec(variant=variant))).adapter > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "shape", "parameters"),
    [
        ("bloom", {"hidden_size": 14336, "n_layer": 70, "n_head": 112, "vocab_size": 250880}, 176.25e9),
        (
            "llama",
            {
                "hidden_size": 8192,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "intermediate_size": 28672,
                "vocab_size": 32000,
            },
            68.98e9,
        ),
    ],
)
def test_the_largest_models_are_counted_with_alternatives_in_seconds(family, shape, parameters) -> None:
    spec = train_run(ModelSpec(name="huge", family=family, random=shape))
    started = time.process_time()
    layout = lay_out(load_reader(spec.model, problem="generation"), WRITING)
    for lora in (spec.lora, FULL, LoraSpec(r=64, targets=["all-linear"])):
        for rows in (1, 8):
            load = Load(rows=rows, length=512, targets=rows * 512, tokens=512000, steps=10)
            found = forecast(replace(spec, lora=lora), layout, load, half=True)
            assert found.frozen + found.whole == pytest.approx(parameters, rel=2e-3)
    assert time.process_time() - started < 15


@pytest.mark.parametrize(("is_packed", "length", "tokens"), [(True, 13, 2 * 34), (False, 20, 2 * (40 + 8))])
def test_the_load_is_that_of_the_largest_batch_and_of_all_steps(is_packed: bool, length: int, tokens: int) -> None:
    texts = [Text(number) for number in (4, 20, 6, 4)]
    spec = train_run(batch_size=2, epochs=2)
    assert sorted(texts[n].num_tokens for n in worst_batch(spec, texts, is_packed=is_packed, steps=4)) == [6, 20]
    found = load_of(spec, texts, is_packed=is_packed)
    assert (found.rows, found.steps) == (2, 4)
    assert (found.length, found.tokens) == (length, tokens)


def test_the_largest_batch_of_all_steps_may_come_after_the_first_ones() -> None:
    texts = [Text(number) for number in (4, 20, 6, 4)]
    spec = train_run(batch_size=1, length_window=1)
    sizes = [largest_batch(spec, texts, is_packed=True, steps=steps) for steps in (1, 2, 3, 4, 400)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 20 == sizes[-1]
    spec = train_run(batch_size=1, length_window=1, max_steps=1)
    assert load_of(spec, texts, is_packed=True).length == sizes[0], "of one step it is the one of that step"


@pytest.mark.parametrize(("every", "scorings"), [(None, 2), (3, 2), (1, 4), (9, 1)])
def test_scorings_are_counted_as_the_training_does_them(every: int | None, scorings: int) -> None:
    assert num_scorings(train_run(batch_size=2, eval_every=every), 4, 4) == scorings
