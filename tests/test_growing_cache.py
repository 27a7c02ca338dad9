"""A cache with room holds what transformers' own would, whatever is done to it."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from lora_cli.growing_cache import growing_cache
from nn.models import tiny_lm


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "qwen3"])
@pytest.mark.parametrize("beams", [1, 3])
def test_the_same_is_written(family: str, beams: int) -> None:
    model = tiny_lm(family)
    ids = torch.randint(5, 40, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(6) >= torch.tensor([[0], [2], [4]])).long()
    settings = {"max_new_tokens": 12, "num_beams": beams, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    wanted = model.generate(**batch, **settings)
    found = model.generate(**batch, **settings, past_key_values=growing_cache(model.config))
    assert torch.equal(found, wanted)


def test_rows_that_leave_or_change_places_and_tokens_that_are_taken_back() -> None:
    config = tiny_lm("llama").config
    own, theirs = growing_cache(config), DynamicCache(config=config)
    draw = torch.Generator().manual_seed(0)

    def add(rows: int, tokens: int) -> None:
        new = torch.randn(2, rows, 2, tokens, 4, generator=draw)
        found, wanted = (cache.update(new[0], new[1], 0) for cache in (own, theirs))
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)

    add(4, 5)
    add(4, 1)
    for cache in (own, theirs):
        cache.reorder_cache(torch.tensor([3, 0, 0, 1]))
    add(4, 1)
    for cache in (own, theirs):
        cache.crop(-3)
    add(4, 2)
    for cache in (own, theirs):
        cache.batch_select_indices(torch.tensor([1, 2]))
    for _ in range(3):
        add(2, 40)


def test_what_is_there_is_not_copied_for_a_token_more() -> None:
    cache = growing_cache(tiny_lm("llama").config)
    places = {cache.update(*torch.zeros(2, 1, 2, 1, 4), 0)[0].data_ptr() for _ in range(60)}
    assert len(places) == 1


def test_layers_with_a_window_stay_as_they_are() -> None:
    config = tiny_lm("gemma3_text", sliding_window=5).config
    kinds = [type(layer).__name__ for layer in DynamicCache(config=config).layers]
    assert "DynamicSlidingWindowLayer" in kinds
    found = [type(layer).__name__ for layer in growing_cache(config).layers]
    assert found == [kind.replace("DynamicLayer", "GrowingLayer") for kind in kinds]


def test_without_a_config_every_layer_grows() -> None:
    cache = growing_cache()
    for layer in (0, 1, 0):
        cache.update(*torch.ones(2, 1, 2, 3, 4), layer)
    assert [(type(layer).__name__, layer.get_seq_length()) for layer in cache.layers] == [
        ("GrowingLayer", 6),
        ("GrowingLayer", 3),
    ]
