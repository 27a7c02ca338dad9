"""What is asked of a server: jobs, which tell what becomes of them. Knows no model and no HTTP."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from lora_cli.errors import LoraError
from lora_cli.spec import DecodeSpec

__all__ = ["Busy", "Job", "LabelJob", "Late", "Piece", "Stopping", "Token", "Work", "WriteJob"]


class Busy(LoraError):  # noqa: N818 - it is what it says
    """As many rows are waiting as may wait."""


class Late(LoraError):  # noqa: N818 - it is what it says
    """No answer came within the time that a request may take."""


class Stopping(LoraError):  # noqa: N818 - it is what it says
    """The server takes no more requests."""


@dataclass(frozen=True)
class Token:
    """One written token: its text, its log probability, and the likeliest alternatives to it."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Piece:
    """A part of one of a job's answers."""

    choice: int
    """Number of the answer."""
    text: str
    """What follows what was told before."""
    tokens: tuple[Token, ...] = ()
    """Its tokens, if log probabilities are wanted."""
    finish: str | None = None
    """Why the answer ends with this piece: stop or length; None: it goes on."""
    num_prompt: int = 0
    num_written: int = 0
    """Tokens read, and tokens written so far."""


@dataclass(kw_only=True, eq=False)
class Job:
    """One request to one adapter. `tell` is called in the thread that works: with a list of answers or with pieces of
    them, or with the exception that ends the job."""

    name: str
    tell: Callable[[Any], None]
    deadline: float = float("inf")
    """On time.monotonic's clock."""
    is_cancelled: bool = False
    """Nobody waits for the answer any more."""

    @property
    def size(self) -> int:
        """Rows that it puts into batches."""
        return 1

    @property
    def is_over(self) -> bool:
        """Whether an answer would come too late."""
        return self.is_cancelled or time.monotonic() > self.deadline

    def give_up(self) -> None:
        """Tell that it is over."""
        self.tell(Late("no answer within the time that a request may take"))


@dataclass(kw_only=True, eq=False)
class LabelJob(Job):
    """Rows to be classified: told as one list of answers."""

    rows: list[dict[str, Any]]
    answers: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    """Row → its answer, as far as there is one."""

    @property
    def size(self) -> int:
        """Rows that it puts into batches."""
        return len(self.rows)


@dataclass(kw_only=True, eq=False)
class WriteJob(Job):
    """A prompt to be answered: told piece by piece."""

    row: dict[str, Any]
    decode: DecodeSpec
    n: int = 1
    """Answers wanted."""
    seed: int = 0
    """Of what is drawn; answer k draws by seed + k."""
    logprobs: int | None = None
    """Alternatives of which log probabilities are wanted; None: not even the token's own."""
    streams: bool = False
    """Whether pieces are wanted as they come; else each answer comes as one piece."""

    @property
    def size(self) -> int:
        """Rows that it puts into batches."""
        return self.n


class Work(Protocol):
    """What is done with jobs, batch by batch. One thread calls it, or several by turns; `step` all at once."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is begun."""

    @property
    def num_tokens(self) -> int:
        """Tokens of what is begun."""

    def begin(self, waiting: deque[Job]) -> None:
        """Take jobs from the left, as many as there is room for."""

    def step(self) -> bool:
        """One forward pass; False: there was nothing left to compute."""

    def end(self, error: LoraError) -> None:
        """Break off what is begun."""
