"""Conversations: what the assistant says is learnt. Knows a chat template, tokens and losses; not the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_cli.errors import ConfigError, DataError, ModelError, printable
from lora_cli.spec import ChatSpec
from lora_cli.tasks.encoding import Reader
from lora_cli.tasks.generation import TextTask
from lora_cli.tasks.prompts import clean
from lora_cli.tasks.rows import Rows, unknown
from lora_cli.tasks.sequences import IGNORED, EncodedTexts, Query, TextExample, Writer

__all__ = ["TEMPLATES", "Chat"]

TEMPLATES: dict[str, str | None] = {
    "tokenizer": None,
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + turn_end }}"
    "{% if m.role == 'assistant' and eos_token != turn_end %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "plain": "{% for m in messages %}{{ m.role | capitalize + ': ' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}",
}
"""task.template → the template in Jinja; None: the one that the tokenizer brings."""
_TURN_END = "<|im_end|>"
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
            ConfigError: there is no chat template.
            ModelError: the chat template rewrites what was said before.
        """
        self.check(rows)
        writer = self._decoder(reader)
        most = min(self.spec.max_length, writer.max_length)
        examples, queries, num_cut = [], [], 0
        for index, messages in enumerate(self._conversations(rows)):
            last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
            ids, labels = self._encoded(messages[: last + 1], writer, rows.where(index))
            num_cut += len(ids) > most
            kept = self._kept(len(ids), most)
            # No token predicts the first one.
            examples.append(TextExample(index, ids[kept], [IGNORED, *labels[kept][1:]]))
            query, _ = self._query(index, messages[:last], writer, rows.where(index))
            queries.append(replace(query, references=[messages[last]["content"].strip()]))
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
        found = []
        for index, messages in enumerate(self._conversations(rows)):
            asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            found.append(self._query(index, asked, writer, rows.where(index)))
        return [query for query, _ in found], sum(was_cut for _, was_cut in found)

    def row_of(self, text: str) -> dict[str, Any]:
        """The row that a person means who types only a text."""
        return {self.spec.messages: [{"role": "user", "content": text}]}

    def _decoder(self, reader: Reader) -> Writer:
        writer = self._writer(reader)
        if writer.decoder_start is not None:
            raise ConfigError("task", self.spec.name, "conversations need a decoder, such as model=smollm2-135m")
        return writer

    def _encoded(self, messages: Sequence[Message], writer: Writer, where: str) -> tuple[list[int], list[int]]:
        """Token ids and labels of a conversation that the assistant ends; of what it says, its end mark is the last."""
        pieces = writer.rendered(self._pieces(messages, writer, where))
        ids, labels = list(self._before(writer)), [IGNORED] * len(self._before(writer))
        for number, found in enumerate(pieces):
            said = 0
            if number % 2 == 1:
                said = len(found) - found[::-1].index(writer.eos) if writer.eos in found else len(found)
                if number == len(pieces) - 1:
                    found = found[:said] if writer.eos in found else [*found, writer.eos]
                    said = len(found)
            ids += found
            labels += [*found[:said], *[IGNORED] * (len(found) - said)]
        return ids, labels

    def _query(self, index: int, messages: Sequence[Message], writer: Writer, where: str) -> tuple[Query, bool]:
        """The tokens that stand before an answer in training too, and whether they were cut."""
        texts = self._pieces(messages, writer, where)
        ids = [*self._before(writer), *(token for piece in writer.rendered(texts) for token in piece)]
        room = writer.budget(self.spec.max_length, {"task.decode.max_new_tokens": self.spec.decode.max_new_tokens})
        return Query(index, writer.unguarded("".join(texts)), ids[self._kept(len(ids), room)]), len(ids) > room

    def _pieces(self, messages: Sequence[Message], writer: Writer, where: str) -> list[str]:
        """The rendered conversation, in turn what comes before an answer and an answer; the last may be yet to come."""
        texts: list[str] = []
        said = ""
        for place in range(len(messages) + 1):
            is_answer = place < len(messages) and messages[place]["role"] == "assistant"
            is_asked = place == len(messages) and messages[-1]["role"] != "assistant"
            if not is_answer and not is_asked:
                continue
            asked = self._rendered(messages[:place], writer, where, ask=True)
            answered = self._rendered(messages[: place + 1], writer, where) if is_answer else asked
            if not (asked.startswith(said) and answered.startswith(asked)):
                what = "its chat template rewrites earlier turns, so they cannot be learnt as they will be read"
                raise ModelError(f"{type(writer.tokenizer).__name__}: {what}; task.template=chatml does not")
            texts += [asked[len(said) :], answered[len(asked) :]] if is_answer else [asked[len(said) :]]
            said = answered
        return texts

    def _before(self, writer: Writer) -> list[int]:
        """The mark that begins a text: a tokenizer's own template writes it, where it is wanted."""
        return [] if TEMPLATES[self.spec.template] is None else writer.before

    def _kept(self, length: int, most: int) -> slice:
        return slice(0, most) if self.spec.truncate == "right" else slice(max(0, length - most), length)

    def _rendered(self, messages: Sequence[Message], writer: Writer, where: str, *, ask: bool = False) -> str:
        template = TEMPLATES[self.spec.template]
        if template is None and not getattr(writer.tokenizer, "chat_template", None):
            raise ConfigError("task.template", "tokenizer", "this model's tokenizer has none: chatml or plain")
        # To a tokenizer that lacks it, ChatML's mark is but words, which an answer would end in.
        turn_end = _TURN_END if _TURN_END in writer.tokenizer.get_added_vocab() else writer.tokenizer.eos_token
        guarded = [{**message, "content": writer.guarded(message["content"])} for message in messages]
        try:
            return str(
                writer.tokenizer.apply_chat_template(
                    guarded, chat_template=template, tokenize=False, add_generation_prompt=ask, turn_end=turn_end
                )
            )
        except Exception as error:
            # Templates are programs of their authors, which raise what they like: roles out of turn, for one.
            reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__, 120)
            raise DataError(where, f"the chat template refuses the conversation: {reason}") from error

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
        if messages[0]["role"] == "assistant":
            raise DataError(where, "the assistant speaks first; templates want a turn of the user or system before")
        return messages
