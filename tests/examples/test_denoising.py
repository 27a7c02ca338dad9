"""What is masked and what is kept make the original again."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import denoising

SENTINELS = list(range(1000, 1100))


def restored(source: list[int], target: list[int]) -> list[int]:
    """The source with each sentinel replaced by what follows it in the target."""
    spans: dict[int, list[int]] = {}
    for token in target:
        if token in SENTINELS:
            spans[token] = open_span = []
        else:
            open_span.append(token)
    return [token for kept in source for token in spans.get(kept, [kept])]


@given(ids=st.lists(st.integers(2, 999), min_size=2, max_size=300), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_kept_text_and_masked_spans_make_the_original(ids: list[int], seed: int) -> None:
    source, target = denoising.corrupt(ids, SENTINELS, random.Random(seed))
    assert restored(source, target) == ids
    used = [token for token in target if token in SENTINELS]
    assert used == SENTINELS[: len(used)]
    assert [token for token in source if token in SENTINELS] == used[:-1]
    assert len(target) - len(used) == max(1, round(0.15 * len(ids)))


def test_spans_are_of_three_tokens_on_average() -> None:
    _, target = denoising.corrupt(list(range(200)), SENTINELS, random.Random(0))
    assert len([token for token in target if token in SENTINELS]) == 10 + 1


@given(
    turns=st.lists(st.text(st.characters(codec="ascii", categories=["L", "P"]), max_size=30), min_size=2, max_size=8)
)
@settings(max_examples=40, deadline=None)
def test_the_masked_turn_back_in_its_place_makes_the_dialogue(turns: list[str]) -> None:
    source, turn = denoising.gap("\n".join(turns))
    assert source.replace(denoising.SENTINELS[0], turn, 1).split("\n") == turns


def test_the_masked_turn_is_the_one_that_overlaps_most() -> None:
    source, turn = denoising.gap("A: tea or coffee\nB: hm\nA: the tea is out, take coffee or water\nB: water, then")
    assert turn == "A: the tea is out, take coffee or water"
    assert source == "A: tea or coffee\nB: hm\n<extra_id_0>\nB: water, then"


def test_padding_is_masked_in_the_source_and_not_counted_in_the_target() -> None:
    batch = denoising.padded([([5, 6], [7]), ([8], [9, 4])])
    torch.testing.assert_close(batch["input_ids"], torch.tensor([[5, 6], [8, 0]]))
    torch.testing.assert_close(batch["attention_mask"], torch.tensor([[1, 1], [1, 0]]))
    torch.testing.assert_close(batch["labels"], torch.tensor([[7, -100], [9, 4]]))
