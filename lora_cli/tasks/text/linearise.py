"""Structured data as one line of text, as the data-to-text experiments of the LoRA paper have it. Knows text only."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lora_cli.errors import DataError

__all__ = ["WEBNLG_SEEN", "linearise_dart", "linearise_e2e", "linearise_webnlg", "webnlg_group"]

_E2E_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
"""Attributes that the paper's files rename; name, food, customer rating, area and near stay."""
_E2E_SLOT = re.compile(r"\s*([^\[\],]+?)\s*\[([^\[\]]*)\]\s*(?:,|$)")

WEBNLG_SEEN = frozenset(
    {
        "Airport",
        "Astronaut",
        "Building",
        "City",
        "ComicsCharacter",
        "Food",
        "Monument",
        "SportsTeam",
        "University",
        "WrittenWork",
    }
)
"""Categories of WebNLG 2017's training rows; the test rows have five more."""


def linearise_e2e(meaning: str) -> str:
    """`name[Blue Spice], eatType[pub]` → `name : Blue Spice | Type : pub`.

    Attributes are named as in the files of microsoft/LoRA (and of Li and Liang 2021, arXiv:2101.00190). Values are
    left as the data set has them; those files have them tokenised (`£ 20 - 25`), like their references.

    Raises:
        DataError: not a list of attribute[value].
    """
    slots, end = [], 0
    while end < len(meaning):
        slot = _E2E_SLOT.match(meaning, end)
        if slot is None:
            raise DataError("meaning_representation", f"not a list of attribute[value], ...: {meaning[:120]!r}")
        slots.append(f"{_E2E_NAMES.get(slot[1], slot[1])} : {slot[2]}")
        end = slot.end()
    return " | ".join(slots)


def linearise_webnlg(triples: Sequence[str]) -> str:
    """`["Aarhus | leader | Bundsgaard", ...]` → `Aarhus : leader : Bundsgaard | ...`; underscores stay.

    Raises:
        DataError: a triple is not of three parts.
    """
    return _joined([triple.split(" | ") for triple in triples])


def linearise_dart(triples: Sequence[Sequence[str]]) -> str:
    """`[["Mars Hill College", "JOINED", "1973"], ...]` → `Mars Hill College : joined : 1973 | ...`.

    Raises:
        DataError: a triple is not of three parts.
    """
    return _joined([[part.lower() if place == 1 else part for place, part in enumerate(triple)] for triple in triples])


def webnlg_group(category: str) -> str:
    """seen or unseen: whether WebNLG 2017's training rows have the category."""
    return "seen" if category in WEBNLG_SEEN else "unseen"


def _joined(triples: Sequence[Sequence[str]]) -> str:
    for triple in triples:
        if len(triple) != 3:
            raise DataError("triples", f"not subject, relation and object: {' | '.join(triple)[:120]!r}")
    return " | ".join(" : ".join(triple) for triple in triples)
