"""What frozen lower layers give is kept, and nothing but the time changes."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_cli.errors import ConfigError
from lora_cli.frozen_cache import FrozenCache
from lora_cli.unpadded import remove_padding
from nn.models import tiny_lm
from test_unpadded import batch, build, texts

ENCODERS = ("tiny-bert", "tiny-roberta", "tiny-electra", "tiny-distilbert", "tiny-modernbert")
DECODERS = {
    **{family: {} for family in ("llama", "gpt_neox", "phi", "gemma3_text", "mixtral")},
    "gpt2": {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"dropout": 0.0},
}
"""Families, and what takes dropout out of those that have it."""
FIRST, SECOND = [7, 3, 40, 7, 12], [5, 21]
MIB = 2**20


def quiet(name: str, **changes: object) -> torch.nn.Module:
    """A tiny encoder in training, without dropout unless `changes` say so."""
    config = build(name).config.to_dict()
    return build(name, **{key: 0.0 for key in config if "dropout" in key and config[key]} | changes).train()


def freeze(model: torch.nn.Module, *names: str) -> torch.nn.Module:
    """A model without padding of which only parameters with one of these words in their names train."""
    assert remove_padding(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(word in name for word in names))
    return model


def last_layer(model: torch.nn.Module) -> str:
    return f".{model.config.num_hidden_layers - 1}."


def logits_and_gradients(model: torch.nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    model.zero_grad()
    logits = model(**inputs).logits
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def cached(model: torch.nn.Module, *batches: dict[str, Tensor], kind: str = "memory", limit: int = MIB) -> FrozenCache:
    cache = FrozenCache(model, functools.partial(model, **batches[0]), kind=kind, limit=limit)
    cache.fill(functools.partial(model, **inputs) for inputs in batches)
    model.train()
    return cache


def calls_of_lower_layers(model: torch.nn.Module, run: Callable[[], object]) -> int:
    """How often a frozen projection is computed."""
    counted: list[object] = []
    frozen = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and not m.weight.requires_grad]
    handles = [module.register_forward_hook(lambda *args: counted.append(args[0])) for module in frozen[:2]]
    run()
    for handle in handles:
        handle.remove()
    return len(counted)


def check_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * max(1.0, float(other.abs().max())))


def shuffled(inputs: dict[str, Tensor], *rows: int) -> dict[str, Tensor]:
    """Some rows of a batch in another order, cut to their longest."""
    width = int(inputs["attention_mask"][list(rows)].sum(1).max())
    return {name: value[list(rows), :width] for name, value in inputs.items()}


@pytest.mark.parametrize("name", ENCODERS)
def test_logits_and_gradients_of_an_encoder_are_those_without_it(name: str) -> None:
    model = quiet(name)
    freeze(model, last_layer(model), "classifier", "pooler", "head.")
    inputs = batch(FIRST, model.config.pad_token_id, types=name == "tiny-bert")
    mixed = shuffled(inputs, 3, 0, 2)
    wanted = [logits_and_gradients(model, each) for each in (inputs, mixed)]
    cache = cached(model, inputs)
    assert cache.num_texts == len(FIRST)
    for each, right in zip((inputs, mixed), wanted, strict=True):
        check_equal(logits_and_gradients(model, each), right)
    cache.close()
    assert torch.equal(logits_and_gradients(model, inputs)[0], wanted[0][0])


@pytest.mark.parametrize("family", DECODERS)
def test_those_of_a_decoder_too(family: str) -> None:
    model = tiny_lm(family, use_cache=False, **DECODERS[family]).train()
    freeze(model, last_layer(model))
    inputs = texts()
    mixed = shuffled(inputs, 2, 1)
    wanted = [logits_and_gradients(model, each) for each in (inputs, mixed)]
    cached(model, shuffled(inputs, 0, 2, 3))
    for each, right in zip((inputs, mixed), wanted, strict=True):
        check_equal(logits_and_gradients(model, each), right)


def test_lower_layers_run_only_for_texts_that_are_not_kept() -> None:
    model = quiet("tiny-bert")
    freeze(model, last_layer(model), "classifier")
    known, unknown = batch(FIRST, 0), batch(SECOND, 0, seed=2)
    cached(model, known)
    assert calls_of_lower_layers(model, lambda: model(**known)) == 0
    assert calls_of_lower_layers(model, lambda: model(**unknown)) == 2
    assert calls_of_lower_layers(model, lambda: model.eval()(**known)) == 0


def test_texts_beyond_the_bound_are_computed_as_they_come() -> None:
    model = quiet("tiny-bert")
    freeze(model, last_layer(model), "classifier")
    known, unknown = batch([9, 4], 0), batch([9, 6], 0, seed=2)
    both = {name: torch.cat([unknown[name][:1], known[name], unknown[name][1:]]) for name in known}
    wanted = logits_and_gradients(model, both)
    room = 13 * model.config.hidden_size * 4
    cache = cached(model, known, unknown, limit=room)
    assert (cache.num_texts, cache.num_bytes) == (2, room)
    check_equal(logits_and_gradients(model, both), wanted)
    assert cache.num_texts == 2


def test_the_same_tokens_as_another_type_are_another_text() -> None:
    model = quiet("tiny-bert")
    freeze(model, last_layer(model), "classifier")
    one = batch([9], 0, types=True)
    other = {**one, "token_type_ids": 1 - one["token_type_ids"]}
    wanted = logits_and_gradients(model, other)
    cached(model, one)
    check_equal(logits_and_gradients(model, other), wanted)


def test_on_disk_it_is_the_same_and_no_file_stays(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = []
    for kind in ("memory", "disk"):
        model = quiet("tiny-bert")
        freeze(model, last_layer(model), "classifier")
        cache = cached(model, batch(FIRST, 0), batch(SECOND, 0, seed=2), kind=kind)
        mixed = batch(FIRST, 0)
        found.append(logits_and_gradients(model, mixed))
        assert calls_of_lower_layers(model, lambda model=model, mixed=mixed: model(**mixed)) == 0
        assert not list(tmp_path.iterdir())
        cache.close()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: object) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **settings: Full())
    model = quiet("tiny-bert")
    freeze(model, last_layer(model), "classifier")
    with pytest.raises(ConfigError, match=r"train\.cache=disk: No space left on device in .*; TMPDIR names another"):
        cached(model, batch(FIRST, 0), kind="disk")


@pytest.mark.parametrize("names", [["layer.0."], ["word_embeddings"], [""]])
def test_what_trains_from_below_is_refused(names: list[str]) -> None:
    model = quiet("tiny-bert")
    freeze(model, *names)
    with pytest.raises(ConfigError, match=r"train\.cache=memory: only where the lower layers are frozen"):
        cached(model, batch(FIRST, 0))
    assert len(model._forward_pre_hooks) == 1


@pytest.mark.parametrize("kind", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_below_is_refused_and_nothing_is_drawn(kind: str) -> None:
    model = quiet("tiny-bert", **{kind: 0.1})
    freeze(model, last_layer(model), "classifier")
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    with pytest.raises(ConfigError, match=r"train\.cache=memory: only with model\.dropout=0"):
        cached(model, batch(FIRST, 0))
    assert torch.equal(torch.rand(3), wanted)


def test_dropout_above_is_drawn_as_without_it() -> None:
    model = quiet("tiny-bert")
    freeze(model, last_layer(model), "classifier")
    model.dropout.p = 0.5
    inputs = batch(FIRST, 0)
    found = []
    for prepare in (lambda: None, lambda: cached(model, inputs)):
        prepare()
        torch.manual_seed(3)
        found.append(logits_and_gradients(model, inputs))
    check_equal(*found)


def test_nothing_below_the_first_layer_that_trains_is_differentiated() -> None:
    model = quiet("tiny-bert")
    freeze(model, last_layer(model), "classifier")
    seen: list[str] = []
    for name, module in model.named_modules():
        if name.endswith((".attention", "embeddings")):
            module.register_full_backward_hook(lambda *args, name=name: seen.append(name))
    logits = model(**batch(FIRST, 0)).logits
    names: set[object] = set()
    nodes = [logits.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(node)
        nodes += [following for following, _ in node.next_functions if following and following not in names]
    assert seen == []
    lower = sum("NativeLayerNorm" in type(node).__name__ for node in names)
    assert lower == 2, "norms of the last layer only"
