"""What requests and answers look like: bodies as the OpenAI client sends and reads them, and those of our own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lora_cli.spec import MAX_SEED

__all__ = [
    "AdapterRequest",
    "ChatMessage",
    "ChatRequest",
    "ClassifyRequest",
    "CompletionRequest",
    "Failure",
    "Problem",
    "StreamOptions",
    "WriteRequest",
]

MAX_INPUTS = 256
"""Texts in a request."""
MAX_ANSWERS = 16
MAX_STOPS = 4
Name = Annotated[str, Field(description="Name of an adapter: see GET /v1/models")]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
_LARGEST_SEED = 9 * 10**18
"""Answer k of n draws by seed + k, at most MAX_SEED. Bounds stand in the description as floats, so it has to be one."""
assert _LARGEST_SEED <= MAX_SEED - MAX_ANSWERS


class _Body(BaseModel):
    # A field that does not exist is a wish that would not be met.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, values: Any) -> Any:
        """3.0 is a whole number to JSON, but not to Python's strict types."""
        if not isinstance(values, dict):
            return values
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

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class WriteRequest(_Body):
    """What completions and chat completions have in common. What is left out is as the adapter's run decodes."""

    model: Name
    max_tokens: int | None = Field(default=None, ge=1, le=1 << 20, description="Longest answer in tokens")
    temperature: float | None = Field(default=None, ge=0, le=2, description="0: the likeliest token")
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int = Field(default=1, ge=1, le=MAX_ANSWERS, description="Answers to each prompt")
    seed: int | None = Field(default=None, ge=0, le=_LARGEST_SEED)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    user: str | None = None

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


class ChatMessage(_Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = None


class ChatRequest(WriteRequest):
    """A conversation, put into the adapter's own template."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_INPUTS)]
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1 << 20, description="The same as max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="Alternatives to each token")


class Problem(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Failure(BaseModel):
    """The body of every answer that is none."""

    error: Problem
