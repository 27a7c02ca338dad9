"""Conversations: what the assistant says is learnt. Knows a chat template, tokens and losses; not the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_cli.errors import ConfigError, DataError, ModelError, printable
from lora_cli.spec import ChatSpec
from lora_cli.tasks.encoding import Reader
from lora_cli.tasks.generation import TextTask
from lora_cli.tasks.prompts import clean
from lora_cli.tasks.rows import Rows, unknown
from lora_cli.tasks.sequences import IGNORED, EncodedTexts, Query, TextExample, Writer

__all__ = ["TEMPLATES", "Chat"]

_TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
TEMPLATES: dict[str, str | None] = {
    "tokenizer": None,
    "chatml": _TURNS
    + "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "plain": "{% for m in messages %}{{ m.role | capitalize + ': ' + m.content }}"
    + "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}",
}
"""task.template → the template in Jinja; None: the one that the tokenizer brings."""
_ROLES = ("system", "user", "assistant")
_ALIASES = {"human": "user", "gpt": "assistant", "from": "role", "value": "content"}
"""What other tools call roles and keys."""

Message = dict[str, str]


class Chat(TextTask[ChatSpec]):
    """Conversations of a system, a user and an assistant; every turn of the assistant is learnt."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of the conversation."""
        return (self.spec.messages,)

    @property
    def all_columns(self) -> tuple[str, ...]:
        """Columns by which a row is a repeat of another."""
        return self.columns

    def describe(self) -> str:
        """What goes in and what comes out, for people."""
        return f"{printable(self.spec.messages, 40)} → the assistant's turns"

    def check(self, rows: Rows) -> None:
        """Refuse rows that `encode` would refuse, before there is a tokenizer.

        Raises:
            DataError: no conversation, or one in which the assistant does not speak; names the row.
        """
        for index, messages in enumerate(self._conversations(rows)):
            if not any(message["role"] == "assistant" for message in messages):
                raise DataError(rows.where(index), f"column '{self.spec.messages}': the assistant says nothing")

    def encode(self, rows: Rows, reader: Reader) -> EncodedTexts:
        """An example of each conversation, and its last answer with all that came before as a query.

        Raises:
            DataError: as `check`.
            ModelError: there is no chat template, or one that rewrites what was said before.
        """
        self.check(rows)
        writer = self._decoder(reader)
        most = min(self.spec.max_length, writer.max_length)
        examples, queries, num_cut = [], [], 0
        for index, messages in enumerate(self._conversations(rows)):
            ids, labels = self._encoded(messages, writer)
            num_cut += len(ids) > most
            kept = self._kept(len(ids), most)
            # No token predicts the first one.
            examples.append(TextExample(index, ids[kept], [IGNORED, *labels[kept][1:]]))
            last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
            query = self._query(index, messages[:last], writer)
            queries.append(Query(index, query.text, query.input_ids, [messages[last]["content"].strip()]))
        return EncodedTexts(
            examples=examples,
            num_truncated=num_cut,
            num_empty=sum(not query.references[0] for query in queries),
            num_tokens=sum(example.num_tokens for example in examples),
            queries=queries,
        )

    def encode_queries(self, rows: Rows, reader: Reader) -> tuple[list[Query], int]:
        """(a query for each conversation, how many were cut); a last turn of the assistant's is left out."""
        writer = self._decoder(reader)
        queries = []
        for index, messages in enumerate(self._conversations(rows)):
            asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            queries.append(self._query(index, asked, writer))
        return queries, sum(query.num_tokens == self._room(writer) for query in queries)

    def row_of(self, text: str) -> dict[str, Any]:
        """The row that a person means who types only a text."""
        return {self.spec.messages: [{"role": "user", "content": text}]}

    def _decoder(self, reader: Reader) -> Writer:
        writer = self._writer(reader)
        if writer.decoder_start is not None:
            raise ConfigError("task", self.spec.name, "conversations need a decoder, such as model=smollm2-135m")
        return writer

    def _encoded(self, messages: Sequence[Message], writer: Writer) -> tuple[list[int], list[int]]:
        """Token ids and labels of a whole conversation; after the last answer comes nothing but its end mark."""
        texts: list[str] = []
        said = ""
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked, answered = (
                self._rendered(messages[:place], writer, ask=True),
                self._rendered(messages[: place + 1], writer),
            )
            if not (asked.startswith(said) and answered.startswith(asked)):
                what = "its chat template rewrites earlier turns, so they cannot be learnt as they will be read"
                raise ModelError(f"{type(writer.tokenizer).__name__}: {what}; task.template=chatml does not")
            texts += [asked[len(said) :], answered[len(asked) :]]
            said = answered
        ids: list[int] = []
        labels: list[int] = []
        for number, found in enumerate(writer.rendered(texts)):
            is_answer = number % 2 == 1
            end = len(found) - found[::-1].index(writer.eos) if is_answer and writer.eos in found else len(found)
            if is_answer and number == len(texts) - 1:
                found = found[:end] if writer.eos in found else [*found, writer.eos]
                end = len(found)
            ids += found
            labels += [*found[:end], *[IGNORED] * (len(found) - end)] if is_answer else [IGNORED] * len(found)
        return ids, labels

    def _query(self, index: int, messages: Sequence[Message], writer: Writer) -> Query:
        text = self._rendered(messages, writer, ask=True)
        (ids,) = writer.rendered([text])
        return Query(index, text, ids[self._kept(len(ids), self._room(writer))])

    def _room(self, writer: Writer) -> int:
        return writer.budget(self.spec.max_length, self.spec.decode.max_new_tokens)

    def _kept(self, length: int, most: int) -> slice:
        return slice(0, most) if self.spec.truncate == "right" else slice(max(0, length - most), length)

    def _rendered(self, messages: Sequence[Message], writer: Writer, *, ask: bool = False) -> str:
        template = TEMPLATES[self.spec.template]
        if template is None and not getattr(writer.tokenizer, "chat_template", None):
            raise ConfigError("task.template", "tokenizer", "this model's tokenizer has none: chatml or plain")
        try:
            return str(
                writer.tokenizer.apply_chat_template(
                    list(messages), chat_template=template, tokenize=False, add_generation_prompt=ask
                )
            )
        except Exception as error:
            # Templates are programs of their authors, which raise what they like: roles out of turn, for one.
            reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__, 120)
            raise ModelError(f"the chat template refuses a conversation: {reason}") from error

    def _conversations(self, rows: Rows) -> list[list[Message]]:
        return [self._messages(row, rows.where(index)) for index, row in enumerate(rows)]

    def _messages(self, row: Mapping[str, Any], where: str) -> list[Message]:
        column = self.spec.messages
        if column not in row:
            raise unknown(where, "column (task.messages)", column, row)
        cell = row[column]
        if not isinstance(cell, list | tuple) or not cell or not all(isinstance(turn, Mapping) for turn in cell):
            raise DataError(where, f"column '{printable(column, 40)}' is no list of {{role, content}}")
        messages = []
        for turn in cell:
            named = {_ALIASES.get(key, key): value for key, value in turn.items()}
            role, content = named.get("role"), named.get("content")
            role = _ALIASES.get(str(role), role)
            if role not in _ROLES:
                raise DataError(where, f"role '{printable(role, 40)}' is none of {', '.join(_ROLES)}")
            if not isinstance(content, str):
                raise DataError(where, f"a turn of the {role} holds {type(content).__name__}, not text")
            messages.append({"role": str(role), "content": clean(content)})
        return messages
