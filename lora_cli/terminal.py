"""Text that a model writes, on a terminal: as it comes, whole characters only, nothing that a terminal would obey.

Knows a tokenizer and a stream; nothing of models or tasks.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any, TextIO

__all__ = ["Streamer", "plain"]

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers decode a part of a character to."""
_KEPT = frozenset("\n\t\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}")
"""Line ends and tabs are meant; many scripts, and emoji, are not spelt without the joiners."""


class Streamer:
    """transformers' streamer: tokens of one answer in, text out. The whole of it is what `generate` gives.

    Text goes to `out` as soon as no later token can change it: a character of several tokens when its last one is
    there, blanks when something follows, and what may become one of the `stops` when it has not. The answer ends at
    the end mark or before a stop text; blanks around it are left out.
    """

    def __init__(self, tokenizer: Any, out: TextIO, *, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._out, self._stops = tokenizer, out, stops
        self._ids: list[int] | None = None
        self.text = ""
        """What was written so far, before `plain`."""

    def put(self, value: Any) -> None:
        """Take a tensor of token ids, of any shape; the first one is the prompt, which is not written."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        text = self._decoded().rstrip(_INCOMPLETE)
        self._write(text[: len(text) - _held(text, self._stops)])

    def end(self) -> None:
        """No more tokens: write what was held back."""
        self._write(self._decoded())

    def write(self, text: str) -> None:
        """Take a whole answer at once, as a beam search gives it."""
        self._write(text)

    def _decoded(self) -> str:
        ids, eos = self._ids or [], self._tokenizer.eos_token_id
        ids = ids[: ids.index(eos)] if eos in ids else ids
        text = str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for stop in self._stops:
            text = text.partition(stop)[0]
        return text

    def _write(self, text: str) -> None:
        whole = text.strip()
        if len(whole) > len(self.text):
            new, self.text = whole[len(self.text) :], whole
            self._out.write(plain(new))
            self._out.flush()


def plain(text: str) -> str:
    """`text` without the characters that a terminal obeys instead of showing: escapes, bells, carriage returns, and
    marks that turn the direction of what follows. Line ends and tabs stay."""
    return "".join(char for char in text if char in _KEPT or unicodedata.category(char) not in ("Cc", "Cf", "Cs"))


def _held(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of `text` with which one of `stops` may have begun."""
    lengths = (length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
    return max(lengths, default=0)
