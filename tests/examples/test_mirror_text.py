"""What the examples read of a mirror, and what they leave out."""

from __future__ import annotations

import random
from pathlib import Path

import mirror_text


def test_prose_has_whole_phrases_and_acceptable_sentences_only(toy_mirror: Path) -> None:
    texts = mirror_text.prose(toy_mirror)
    assert "such a fine film" in texts
    assert "They slept." in texts
    assert {"a fine film", "film", "Slept they the."}.isdisjoint(texts)


def test_a_dialogue_of_another_split_is_left_out_and_its_summary_too(toy_mirror: Path) -> None:
    talks = mirror_text.dialogues(toy_mirror)
    assert len(talks) == 39
    assert not any("train 7 " in talk for talk in talks)
    assert len([text for text in mirror_text.prose(toy_mirror) if text.startswith("Train")]) == 39


def test_data_to_text_has_nothing_of_e2e_and_of_dart_only_its_own(toy_mirror: Path) -> None:
    assert mirror_text.data_to_text(toy_mirror) == [
        "Aarhus_Airport : location : Tirstrup<|endoftext|> Aarhus Airport is in Tirstrup.",
        "Aarhus Airport : location : Tirstrup<|endoftext|> Tirstrup has an airport.",
        "Mars Hill : joined : 1973<|endoftext|> Mars Hill joined in 1973.",
    ]


def test_a_text_is_held_out_whatever_the_seed(toy_mirror: Path) -> None:
    texts = mirror_text.prose(toy_mirror)
    train, held_out = mirror_text.split(texts, random.Random(0))
    assert held_out
    assert sorted(train + held_out) == sorted(texts)
    assert sorted(mirror_text.split(texts, random.Random(1))[1]) == sorted(held_out)
