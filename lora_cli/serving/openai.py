"""Requests of OpenAI's kind as jobs, and answers as its clients read them. Knows no HTTP."""

from __future__ import annotations

import itertools
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_cli.errors import DataError
from lora_cli.serving.adapters import Entry
from lora_cli.serving.jobs import Piece, Token
from lora_cli.serving.schemas import ChatRequest, CompletionRequest, WriteRequest
from lora_cli.spec import DecodeSpec
from lora_cli.tasks import TextTask
from lora_cli.tasks.chat import Chat

__all__ = ["Reply", "decode_of", "event", "fields_of", "logprobs_of", "rows_of", "seed_of"]


_SAME_NAME = ("temperature", "top_p", "stop")


def decode_of(entry: Entry, body: WriteRequest) -> DecodeSpec:
    """How the answer is written: what the request leaves open, as the adapter's run does it.

    Raises:
        UserError: the settings do not go together.
    """
    assert isinstance(entry.task, TextTask)
    own = entry.task.spec.decode
    longest = body.max_tokens
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        longest = body.max_completion_tokens
    changes: dict[str, Any] = {"stop": [*own.stop, *body.stops]}
    if longest is not None:
        changes["max_new_tokens"] = longest
    if body.temperature is not None or body.top_p is not None:
        usual = own.temperature if own.sample else 1.0
        temperature = usual if body.temperature is None else body.temperature
        if temperature == 0:
            changes |= {"sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": None}
        else:
            top_p = own.top_p if body.top_p is None else body.top_p
            changes |= {"sample": True, "temperature": temperature, "top_p": top_p}
        changes["num_beams"] = 1
    return replace(own, **changes)


def fields_of(body: WriteRequest) -> dict[str, str]:
    """Config key, or place in the data → the field of the request that stands for it."""
    is_new = isinstance(body, ChatRequest) and body.max_completion_tokens is not None
    longest = "max_completion_tokens" if is_new else "max_tokens"
    data = "messages" if isinstance(body, ChatRequest) else "prompt"
    same = {f"task.decode.{name}": name for name in _SAME_NAME}
    return {**same, "task.decode.max_new_tokens": longest, "prompt": data, "messages": data}


def seed_of(body: WriteRequest) -> int:
    """The request's, or another each time."""
    return secrets.randbits(62) if body.seed is None else body.seed


def logprobs_of(body: WriteRequest) -> int | None:
    """Alternatives wanted to each token; None: no log probabilities."""
    if isinstance(body, CompletionRequest):
        return body.logprobs
    assert isinstance(body, ChatRequest)
    return (body.top_logprobs or 0) if body.logprobs else None


def rows_of(entry: Entry, body: WriteRequest) -> list[dict[str, Any]]:
    """The rows that the adapter's task makes its prompts of.

    Raises:
        DataError: a conversation for an adapter that has not learnt any.
    """
    task = entry.task
    assert isinstance(task, TextTask)
    if isinstance(body, CompletionRequest):
        return [_row(entry, text) for text in ([body.prompt] if isinstance(body.prompt, str) else body.prompt)]
    assert isinstance(body, ChatRequest)
    if isinstance(task, Chat):
        turns = [{"role": _role(turn.role), "content": turn.text} for turn in body.messages]
        if turns[-1]["role"] == "assistant":
            raise DataError("messages", "the last turn is the assistant's; there is nothing to answer")
        return [{task.spec.messages: turns}]
    if len(body.messages) != 1:
        raise DataError("messages", "this adapter has learnt no conversations; send one message of the user")
    return [_row(entry, body.messages[0].text)]


def _row(entry: Entry, text: str) -> dict[str, Any]:
    row: dict[str, Any] = entry.task.row_of(text)  # type: ignore[union-attr]
    return row


def _role(role: str) -> str:
    return "system" if role == "developer" else role


@dataclass
class Reply:
    """An answer in the making."""

    body: WriteRequest
    num_prompts: int
    _usage: dict[int, tuple[int, int]] = field(default_factory=dict)
    _choices: dict[int, dict[str, Any]] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set)
    _lengths: dict[int, int] = field(default_factory=dict)
    """Of each answer, the characters of the tokens that were told."""

    def __post_init__(self) -> None:
        self._chats = isinstance(self.body, ChatRequest)
        self._head = {
            "id": ("chatcmpl-" if self._chats else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": self.body.model,
        }

    @property
    def is_done(self) -> bool:
        """Whether every answer has ended."""
        return len(self._choices) == self.num_prompts * self.body.num_answers

    @property
    def usage(self) -> dict[str, int]:
        """Tokens read, each prompt once, and written."""
        read = sum({index // self.body.num_answers: tokens for index, (tokens, _) in self._usage.items()}.values())
        written = sum(tokens for _, tokens in self._usage.values())
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def add(self, number: int, piece: Piece) -> dict[str, Any]:
        """Take a piece of the `number`-th prompt's answers: what a stream tells of it."""
        index = number * self.body.num_answers + piece.choice
        if piece.finish is not None:
            self._usage[index] = piece.num_prompt, piece.num_written
            self._choices[index] = self._choice(index, piece, whole=True)
        chunk = self._choice(index, piece, whole=False)
        self._seen.add(index)
        self._lengths[index] = self._lengths.get(index, 0) + sum(len(token.text) for token in piece.tokens)
        return {**self._head, "object": self._object(chunk=True), "choices": [chunk]}

    def whole(self) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        choices = [self._choices[index] for index in sorted(self._choices)]
        return {**self._head, "object": self._object(chunk=False), "choices": choices, "usage": self.usage}

    def last_chunk(self) -> dict[str, Any]:
        """What a stream ends with if usage is wanted."""
        return {**self._head, "object": self._object(chunk=True), "choices": [], "usage": self.usage}

    def _object(self, *, chunk: bool) -> str:
        return f"chat.completion{'.chunk' if chunk else ''}" if self._chats else "text_completion"

    def _choice(self, index: int, piece: Piece, *, whole: bool) -> dict[str, Any]:
        common = {"index": index, "finish_reason": piece.finish}
        wanted = logprobs_of(self.body) is not None
        if not self._chats:
            logprobs = _completion(piece.tokens, self._lengths.get(index, 0)) if wanted else None
            return {**common, "text": piece.text, "logprobs": logprobs}
        said = {"content": [_chat(token) for token in piece.tokens], "refusal": None} if wanted else None
        message = {"role": "assistant", "content": piece.text}
        if whole:
            return {**common, "message": {**message, "refusal": None}, "logprobs": said}
        if index in self._seen:
            del message["role"]
        return {**common, "delta": message, "logprobs": said}


def event(value: dict[str, Any] | str) -> str:
    """One event of a stream."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"data: {text}\n\n"


def _completion(tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    """`offset`: characters of the tokens before."""
    *offsets, _ = itertools.accumulate((len(token.text) for token in tokens), initial=offset)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        # Of tokens with one text, such as parts of a character, the likeliest: it comes first.
        "top_logprobs": [dict(reversed(token.top)) for token in tokens],
        "text_offset": offsets,
    }


def _chat(token: Token) -> dict[str, Any]:
    top = [_named(text, logprob) for text, logprob in token.top]
    return {**_named(token.text, token.logprob), "top_logprobs": top}


def _named(text: str, logprob: float) -> dict[str, Any]:
    # A part of a character has no text of its own, and which part it is cannot be told from that.
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
