"""Text on a terminal: whole characters, up to the end mark or a stop text, and nothing that a terminal would obey."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.terminal import Streamer, plain
from lora_cli.tokenizer import build_tiny_tokenizer

TOKENIZER = build_tiny_tokenizer(token_types=False)
"""A token a byte: most characters that are not ASCII come in pieces."""
EOS = TOKENIZER.eos_token_id
TEXTS = st.text(st.sampled_from("ab \n\té€😀نُ\u200d\x1b."), max_size=12)


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


class Written(io.StringIO):
    """A stream that remembers what stood there at each flush."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[str] = []

    def flush(self) -> None:
        self.shown.append(self.getvalue())


def stream(ids: list[int], **options: Any) -> tuple[Streamer, Written]:
    out = Written()
    streamer = Streamer(TOKENIZER, out, **options)
    streamer.put(torch.tensor([[7, 7, 7]]))
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return streamer, out


def test_text_is_written_character_by_character_without_the_prompt() -> None:
    _, out = stream([*ids_of("héy"), EOS])
    assert out.shown == ["h", "hé", "héy"]


def test_blanks_around_an_answer_are_left_out_and_those_inside_wait_for_what_follows() -> None:
    _, out = stream([*ids_of(" \na  b \n"), EOS])
    assert out.shown == ["a", "a  b"]


@pytest.mark.parametrize("rest", ["", "more", "END"])
def test_nothing_follows_the_end_mark(rest: str) -> None:
    _, out = stream([*ids_of("a"), EOS, *ids_of(rest)])
    assert out.getvalue() == "a"


def test_a_stop_text_is_never_shown_not_even_its_beginning() -> None:
    _, out = stream(ids_of("Yes, Us\nUser: hi"), stops=["\nUser:", "###"])
    assert out.getvalue() == "Yes, Us"
    assert out.shown[-1] == "Yes, Us"


def test_what_looked_like_a_stop_text_is_written_when_it_is_none() -> None:
    _, out = stream(ids_of("a ## b #"), stops=["###"])
    assert out.getvalue() == "a ## b #"
    assert "a #" not in out.shown


def test_an_answer_at_once_is_treated_the_same() -> None:
    out = Written()
    streamer = Streamer(TOKENIZER, out)
    streamer.write(" a\x1b[31mb\n")
    assert (out.getvalue(), streamer.text) == ("a[31mb", "a\x1b[31mb")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b]0;title\x07b", "a]0;titleb"),
        ("safe\u202egnp.exe\u2066", "safegnp.exe"),
        ("one\r\ntwo\tthree\x9b2J", "one\ntwo\tthree2J"),
        ("می\u200cخواهم 👩\u200d👧 日本語 ﷽ ñ \u0301", "می\u200cخواهم 👩\u200d👧 日本語 ﷽ ñ \u0301"),
        ("half \ud83d", "half "),
    ],
    ids=["escape", "direction", "line ends", "foreign", "surrogate"],
)
def test_a_terminal_shows_what_it_gets_and_obeys_none_of_it(text: str, shown: str) -> None:
    assert plain(text) == shown


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, stops=st.lists(st.text("ab .\n", min_size=1, max_size=3), max_size=2))
def test_what_is_streamed_is_the_answer_that_generate_gives(text: str, stops: list[str]) -> None:
    from lora_cli.engine.generate import text_of

    ids = [*ids_of(text), EOS]
    streamer, out = stream(ids, stops=stops)
    assert streamer.text == text_of(ids, TOKENIZER, [EOS], stops)
    assert out.getvalue() == plain(streamer.text)
    assert all(later.startswith(earlier) for earlier, later in zip(out.shown, out.shown[1:], strict=False))
