"""What requests and answers look like: bodies as the OpenAI client sends and reads them, and those of our own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from lora_cli.errors import listed, nearest
from lora_cli.spec import MAX_SEED

__all__ = [
    "AdapterRequest",
    "ChatMessage",
    "ChatRequest",
    "ClassifyRequest",
    "CompletionRequest",
    "Failure",
    "PlainText",
    "Problem",
    "StreamOptions",
    "TextPart",
    "WriteRequest",
]

MAX_NAME = 64
"""Characters of an unknown name that are compared with the known ones: it may be a megabyte."""
MAX_INPUTS = 256
"""Texts in a request."""
MAX_ANSWERS = 16
MAX_STOPS = 4
Name = Annotated[str, Field(description="Name of an adapter: see GET /v1/models")]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Nothing = Field(default=None, max_length=0, description="Not supported: empty, or left out")
_LARGEST_SEED = 9 * 10**18
"""Answer k of n draws by seed + k, at most MAX_SEED. Bounds stand in the description as floats, so it has to be one."""
assert _LARGEST_SEED <= MAX_SEED - MAX_ANSWERS


class _Body(BaseModel):
    # A field that does not exist is a wish that would not be met.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        names = list(cls.model_fields)
        for name in values:
            if name not in cls.model_fields:
                near = nearest(name[:MAX_NAME], names)
                hint = f"Did you mean {near}? " if near else ""
                said = {"field": name, "hint": hint, "names": listed(names)}
                raise PydanticCustomError("unknown_field", "no such field. {hint}There are: {names}", said)
        # 3.0 is a whole number to JSON, but not to Python's strict types.
        return {key: int(x) if isinstance(x, float) and x.is_integer() else x for key, x in values.items()}


class ClassifyRequest(_Body):
    """Texts to be classified."""

    model: Name
    input: (
        str
        | Annotated[
            list[str | dict[str, str] | Annotated[list[str], Field(min_length=1, max_length=16)]],
            Field(min_length=1, max_length=MAX_INPUTS),
        ]
    ) = Field(description="A text, or texts; of a task that reads several columns, each as an object or a list")


class AdapterRequest(_Body):
    """An adapter in one of the folders named at start."""

    name: Name


class StreamOptions(_Body):
    """What a stream tells besides."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class WriteRequest(_Body):
    """What completions and chat completions have in common. What is left out, or null, is as the adapter's run
    decodes."""

    model: Name
    max_tokens: int | None = Field(default=None, ge=1, le=1 << 20, description="Longest answer in tokens")
    temperature: float | None = Field(default=None, ge=0, le=2, description="0: the likeliest token")
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int | None = Field(default=None, ge=1, le=MAX_ANSWERS, description="Answers to each prompt; 1 if left out")
    seed: int | None = Field(default=None, ge=0, le=_LARGEST_SEED)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Nothing
    user: str | None = None

    @property
    def num_answers(self) -> int:
        """To each prompt."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """Texts at which an answer ends."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class CompletionRequest(WriteRequest):
    """Prompts, each put into the adapter's own template."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
    logprobs: int | None = Field(default=None, ge=0, le=5, description="Alternatives to each token")
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: str | None = Nothing


class TextPart(_Body):
    """A part of a turn."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One turn, also as an answer tells it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_INPUTS)]
    name: str | None = None
    refusal: str | None = Nothing
    annotations: list[Any] | None = Nothing
    audio: dict[str, Any] | None = Nothing
    function_call: dict[str, Any] | None = Nothing
    tool_calls: list[Any] | None = Nothing

    @property
    def text(self) -> str:
        """What is said, its parts on lines of their own."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class PlainText(_Body):
    """The form of an answer."""

    type: Literal["text"]


class ChatRequest(WriteRequest):
    """A conversation, put into the adapter's own template."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_INPUTS)]
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1 << 20, description="The same as max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="Alternatives to each token")
    response_format: PlainText | None = None
    tools: list[Any] | None = Nothing
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="Without effect, as there are no tools")
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = Nothing


class Problem(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Failure(BaseModel):
    """The body of every answer that is none."""

    error: Problem
