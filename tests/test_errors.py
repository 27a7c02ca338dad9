"""Messages: one line, the nearest name, nothing a terminal would act on."""

import pickle

import pytest

from lora_cli.errors import ConfigError, DataError, UnknownName, nearest, printable


@pytest.mark.parametrize(
    ("typed", "options", "meant"),
    [
        ("r", ["lora.alpha", "lora.r", "seed"], "lora.r"),
        ("lora.rnk", ["lora.r", "lora.rank_pattern"], "lora.r"),
        ("qeury", ["query", "value"], "query"),
        ("train.lerning_rate", ["train.lr", "train.warmup"], "train.lr"),
        ("zzz", ["query", "value"], None),
    ],
)
def test_the_nearest_name(typed: str, options: list[str], meant: str | None) -> None:
    assert nearest(typed, options) == meant


def test_a_long_list_of_options_is_cut() -> None:
    text = str(UnknownName("task", "x", [f"name{i:03}" for i in range(500)], "task"))
    assert "and 488 more" in text
    assert len(text) <= 300


def test_control_characters_are_escaped() -> None:
    assert printable("a\x1b[31mb\nc\u202ed") == "a\\x1b[31mb\\nc\\u202ed"
    assert len(printable("x" * 9999)) == 120


@pytest.mark.parametrize(
    "error", [ConfigError("a.b", 3, "less"), UnknownName("a", "b", ["c"], "d"), DataError("file:3", "broken")]
)
def test_errors_survive_the_way_between_processes(error: Exception) -> None:
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
