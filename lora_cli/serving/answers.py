"""What answers look like, for the description of the routes. These make them as they are: nothing is checked here."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel

from lora_cli.serving.gate import OPEN, PAGES
from lora_cli.serving.schemas import Failure

__all__ = [
    "FAILURES",
    "Adapter",
    "Adapters",
    "ChatChoice",
    "ChatCompletion",
    "Classified",
    "Completion",
    "Deleted",
    "Label",
    "Standing",
    "TextChoice",
    "Turn",
    "Usage",
    "answering",
    "describe_token",
]

FAILURES: dict[int | str, dict[str, Any]] = {
    code: {"model": Failure, "description": text}
    for code, text in (
        (400, "No readable request"),
        (401, "No token, or a wrong one"),
        (403, "Another host name than the server's"),
        (404, "No such adapter"),
        (405, "Another method"),
        (408, "The body did not come in time"),
        (413, "Too large"),
        (415, "No JSON"),
        (422, "Not what the route takes, or not what the adapter can do"),
        (429, "Too many texts are waiting"),
        (500, "Internal error, or an adapter that cannot be loaded"),
        (503, "Not now: late, or stopping"),
    )
}
_STREAM: dict[str, Any] = {"text/event-stream": {}}


class Label(BaseModel):
    """The answer to a text: a label with probabilities, or a value."""

    index: int
    label: str | None = None
    probabilities: dict[str, float] | None = None
    value: float | None = None


class Classified(BaseModel):
    """Answers to texts, in their order."""

    object: Literal["list"]
    model: str
    data: list[Label]


class Adapter(BaseModel):
    """An adapter that can be asked for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    task: str
    columns: list[str]
    labels: list[str] | None
    writes: bool
    base: str


class Adapters(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[Adapter]


class Deleted(BaseModel):
    """An adapter that cannot be asked for any more."""

    id: str
    object: Literal["model"]
    deleted: bool


class Standing(BaseModel):
    """How the server is."""

    status: str


class Usage(BaseModel):
    """Tokens read, each prompt once, and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class _Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length"]
    logprobs: dict[str, Any] | None


class TextChoice(_Choice):
    """An answer to a prompt."""

    text: str


class Turn(BaseModel):
    """The assistant's."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Choice):
    """An answer in a conversation."""

    message: Turn


class _Written(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage


class Completion(_Written):
    """Answers to prompts."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class ChatCompletion(_Written):
    """Answers in a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


def answering(model: Any, *, streams: bool = False) -> dict[str, Any]:
    """How a route describes what it answers. It is not checked at each answer."""
    described = {"model": model, **({"content": _STREAM} if streams else {})}
    return {"response_model": None, "responses": {200: described}}


def describe_token(app: FastAPI) -> None:
    """Let the description say which routes need one."""
    description = app.openapi()
    description["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    description["security"] = [{"token": []}]
    for path in (*OPEN, *PAGES):
        for method in description["paths"][path].values():
            method["security"] = []
