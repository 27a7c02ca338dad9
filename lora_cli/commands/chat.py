"""lora chat: lines in, answers out as they come; what was said before is part of the next question."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.commands.infer import write_answer
from lora_cli.errors import ConfigError, UserError, nearest, printable
from lora_cli.process import Terminated
from lora_cli.screen import Screen
from lora_cli.spec import ChatRun, ChatSpec
from lora_cli.tasks import Query, Rows
from lora_cli.tasks.chat import Chat, Message
from lora_cli.terminal import Streamer

if TYPE_CHECKING:
    from lora_cli.saved import Saved

__all__ = ["Conversation", "run"]

_COMMANDS = ("/reset", "/exit")
_HELP = "/reset starts anew, Ctrl-C stops an answer, /exit or Ctrl-D ends"


def run(spec: ChatRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> None:
    """Talk with the run of `spec` on standard input and output until the input ends.

    Raises:
        UserError: the run cannot be used, or its task is no conversation.
    """
    if not isinstance(spec.task, ChatSpec):
        other = f"its task {printable(spec.task.name, 40)} ({spec.task.kind}) is no conversation; see lora infer"
        raise ConfigError("run", spec.run, other)
    from lora_cli.saved import open_saved

    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    saved, screen = open_saved(spec), Screen()
    conversation = Conversation(saved, spec.system, warn=screen.warning)
    if on_terminal := sys.stdin.isatty() and sys.stdout.isatty():
        screen.fact("run", f"{saved.path}   {saved.device}")
        screen.fact("chat", _HELP)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its line editing
    stopped = False
    for number in itertools.count():
        try:
            if stopped:
                print()  # in here, where another Ctrl-C does no harm
                stopped = False
            if not _turn(conversation, spec.seed + number, screen, on_terminal=on_terminal):
                return
        except (UserError, KeyboardInterrupt) as error:
            # A person goes on talking, whatever line the model cannot be asked; in a pipe there is nobody to go on.
            if not on_terminal or isinstance(error, Terminated):
                raise
            if isinstance(error, UserError):
                screen.warning(str(error))
            stopped = True


def _turn(conversation: Conversation, seed: int, screen: Screen, *, on_terminal: bool) -> bool:
    """Read a line and answer it; whether there was one."""
    line = _read(on_terminal)
    if line is None:
        return False
    if line == "/reset":
        conversation.reset()
    elif re.fullmatch(r"/[a-z]+", line):
        near = nearest(line, _COMMANDS)
        screen.warning(f"no command {line}.{f' Did you mean {near}?' if near else ''} {_HELP}")
    elif line.strip():
        _answer(conversation, line, seed)
        print(end="\n" if on_terminal else "")
    return True


def _read(on_terminal: bool) -> str | None:
    """The next line; None where the conversation ends."""
    try:
        line = input("you> " if on_terminal else "")
    except EOFError:
        print(end="\n" if on_terminal else "")
        return None
    return None if line == "/exit" else line


def _answer(conversation: Conversation, line: str, seed: int) -> None:
    query, tokenizer, stops = conversation.ask(line), conversation.saved.tokenizer, conversation.task.spec.decode.stop
    streamer = Streamer(tokenizer, sys.stdout, stops=stops)
    try:
        write_answer(conversation.saved, query, streamer=streamer, seed=seed)
    finally:  # what was said until Ctrl-C was said
        conversation.answered(streamer.text)
        sys.stdout.write("\n")
        sys.stdout.flush()


class Conversation:
    """What was said so far, as far as the model can read it."""

    def __init__(self, saved: Saved, system: str | None, *, warn: Callable[[str], None]) -> None:
        assert isinstance(saved.task, Chat)
        self.saved, self.task, self._warn = saved, saved.task, warn
        self._head: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[Message] = []
        self._warned = False
        self._query([{"role": "user", "content": "?"}])  # a template that refuses `system` says so before anybody asks

    def ask(self, text: str) -> Query:
        """Add the user's turn; the oldest turns are forgotten, two at a time, until all fits.

        Raises:
            UserError: the text cannot be put to the model. The conversation is as it was.
        """
        turns: list[Message] = [*self._turns, {"role": "user", "content": text}]
        query, num_cut = self._query(turns)
        if num_cut and not self._warned:
            self._warned = True
            self._warn(f"the model reads {query.num_tokens:,} tokens; what was said before them is forgotten")
        while num_cut and len(turns) > 1:
            del turns[:2]
            query, num_cut = self._query(turns)
        self._turns = turns
        return query

    def answered(self, text: str) -> None:
        """Add the assistant's turn."""
        self._turns.append({"role": "assistant", "content": text})

    def reset(self) -> None:
        """Forget all but what the assistant is told beforehand."""
        self._turns = []

    def _query(self, turns: Sequence[Message]) -> tuple[Query, int]:
        row = {self.task.spec.messages: [*self._head, *turns]}
        rows = Rows([row], source="conversation", separator="", numbers=[""])
        (query,), num_cut = self.task.encode_queries(rows, self.saved)
        return query, num_cut
