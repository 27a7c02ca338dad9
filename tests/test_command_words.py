"""Words of a command line, and what of them people are shown."""

from __future__ import annotations

import pytest

from lora_cli.words import shortened


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.007098936257405904, "0.007099"),
        ("3.0000000004e-05", "3e-05"),
        ("0.125", "0.125"),
        ("16", "16"),
        ("sst2", "sst2"),
    ],
)
def test_a_drawn_value_is_rounded_and_a_typed_one_is_not(value: object, text: str) -> None:
    assert shortened(value) == text
