"""Texts and references that several of the tests score, and strategies that make more."""

from __future__ import annotations

from hypothesis import strategies as st

PREDICTIONS = [
    "The Mill is a family-friendly pub near Café Rouge.",
    "Prices at Zizzi start from £20-25, and it doesn't serve Chinese food!",
    "Blue Spice is cheap",
    "There's a coffee shop called Cotto in the city centre; it is rated 3 out of 5.",
    "riverside riverside riverside",
]
REFERENCES = [
    [
        "The Mill, near Café Rouge, is a pub that welcomes families.",
        "Near Café Rouge there is a family-friendly pub, The Mill.",
        "The Mill is a child friendly pub near Café Rouge.",
    ],
    [
        "Zizzi costs £20-25 and does not serve Chinese food.",
        "Zizzi doesn't serve Chinese food. Prices start from £20-25.",
    ],
    ["Blue Spice is a cheap place in the riverside area."],
    [
        "Cotto is a coffee shop in the city centre. It's rated 3 out of 5.",
        "There is a coffee shop in the city centre called Cotto, rated 3 out of 5.",
        "In the city centre, Cotto is a coffee shop with 3 of 5 stars.",
        "Cotto, a coffee shop, is in the centre.",
    ],
    ["Loch Fyne is at the riverside.", "At the riverside is Loch Fyne, a restaurant."],
]

_WORDS = ["the", "mill", "serves", "serving", "food", "Food", "is", "isn't", "near", "5.5", "£20-25", ".", "Café"]
TEXTS = st.lists(st.sampled_from(_WORDS), min_size=1, max_size=12).map(" ".join)
ROWS = st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=2, max_size=5)
Rows = list[tuple[str, list[str]]]


def split(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """(texts, references) of `rows`."""
    return [text for text, _ in rows], [targets for _, targets in rows]
