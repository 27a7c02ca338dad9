"""The shipped data set: how many messages, how balanced, and how far each is from all others."""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "lora_cli" / "tasks" / "data" / "support_intents"
SIZES = {"train": 76, "validation": 18, "test": 18}
"""Split → messages of each intent."""
MOST_WORDS_SHARED, MOST_CHARACTERS_SHARED = 0.30, 0.40
"""Largest Jaccard similarities allowed of any two messages; a little above what was measured."""


class Message(NamedTuple):
    split: str
    text: str
    label: str

    @property
    def words(self) -> list[str]:
        return re.findall(r"(?:[^\W_]|')+", self.text.lower())


def read(split: str) -> list[Message]:
    with (FOLDER / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        return [Message(split, row["text"], row["label"]) for row in csv.DictReader(file)]


def ngrams(items: Sequence[Hashable], n: int) -> set[tuple[Hashable, ...]]:
    return {tuple(items[start : start + n]) for start in range(len(items) - n + 1)}


def most_similar(sets: Sequence[set[tuple[Hashable, ...]]]) -> float:
    """The largest Jaccard similarity of two of the sets; by shared items, since most pairs share none."""
    holders: defaultdict[Hashable, list[int]] = defaultdict(list)
    for number, items in enumerate(sets):
        for item in items:
            holders[item].append(number)
    shared: Counter[tuple[int, int]] = Counter()
    for numbers in holders.values():
        shared.update(combinations(numbers, 2))
    return max(common / (len(sets[a]) + len(sets[b]) - common) for (a, b), common in shared.items())


def by_words(messages: Iterable[Message]) -> list[set[tuple[Hashable, ...]]]:
    return [ngrams(message.words, 3) for message in messages]


def by_characters(messages: Iterable[Message]) -> list[set[tuple[Hashable, ...]]]:
    return [ngrams(" ".join(message.words), 5) for message in messages]


@pytest.fixture(scope="module")
def messages() -> list[Message]:
    return [message for split in SIZES for message in read(split)]


@pytest.fixture(scope="module")
def card() -> str:
    return (FOLDER / "README.md").read_text(encoding="utf-8")


def test_every_intent_of_the_task_has_the_same_share_of_every_split(messages: list[Message]) -> None:
    labels = yaml.safe_load((ROOT / "conf" / "task" / "support_intents.yaml").read_text())["labels"]
    expected = {(split, label): size for split, size in SIZES.items() for label in labels}
    assert Counter((message.split, message.label) for message in messages) == expected


def test_no_message_stands_twice_whatever_its_case_and_punctuation(messages: list[Message]) -> None:
    assert len({tuple(message.words) for message in messages}) == len(messages) == 1344


def test_no_two_messages_share_many_word_trigrams(messages: list[Message], card: str) -> None:
    measured = most_similar(by_words(messages))
    assert measured < MOST_WORDS_SHARED
    assert f"word trigrams | {measured:.2f} |" in card


def test_no_two_messages_share_many_character_5_grams(messages: list[Message], card: str) -> None:
    measured = most_similar(by_characters(messages))
    assert measured < MOST_CHARACTERS_SHARED
    assert f"character 5-grams | {measured:.2f} |" in card


def test_messages_are_plain_text_of_4_to_45_words(messages: list[Message]) -> None:
    lengths = [len(message.text.split()) for message in messages]
    assert min(lengths) >= 4
    assert max(lengths) <= 45
    assert all(message.text == message.text.strip() and message.text.isprintable() for message in messages)


def test_few_messages_open_alike(messages: list[Message]) -> None:
    openings = Counter(tuple(message.words[:4]) for message in messages)
    assert max(openings.values()) <= 3


def test_the_card_describes_every_intent(messages: list[Message], card: str) -> None:
    assert all(f"| `{label}` |" in card for label in {message.label for message in messages})
