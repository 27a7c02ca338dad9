"""Plain text, learnt whole. Knows rows, tokens and losses; not the model."""

from __future__ import annotations

from typing import Any

from lora_cli.errors import ConfigError, printable
from lora_cli.spec import LanguageModelingSpec
from lora_cli.tasks.encoding import Reader
from lora_cli.tasks.generation import TextTask
from lora_cli.tasks.prompts import Prompt, cell_text
from lora_cli.tasks.rows import Rows
from lora_cli.tasks.sequences import IGNORED, EncodedTexts, Query, TextExample, Writer

__all__ = ["LanguageModeling"]


class LanguageModeling(TextTask[LanguageModelingSpec]):
    """Texts of any length; each token but the first is predicted once, from what stands before it in its example."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of the text."""
        return (self.spec.text,)

    def describe(self) -> str:
        """What goes in and what comes out, for people."""
        return f"{printable(self.spec.text, 40)} → each next token"

    def check(self, rows: Rows) -> None:
        """Refuse rows that `encode` would refuse, before there is a tokenizer.

        Raises:
            DataError: the column is missing, or a cell is no text; names the row.
        """
        self._texts(rows)

    def encode(self, rows: Rows, reader: Reader) -> EncodedTexts:
        """Examples of at most task.max_length tokens; neighbours share one token, so that none goes unpredicted.

        Raises:
            DataError: as `check`.
        """
        writer = self._decoder(reader)
        texts = [prompt.text for prompt in self._texts(rows)]
        most = min(self.spec.max_length, writer.max_length)
        pieces = [
            ids[start : start + most]
            for ids in writer.plain(texts)
            for start in range(0, max(1, len(ids) - 1), most - 1)
        ]
        return EncodedTexts(
            examples=[TextExample(index, ids, [IGNORED, *ids[1:]]) for index, ids in enumerate(pieces)],
            num_truncated=0,
            num_empty=sum(not text.strip() for text in texts),
            num_tokens=sum(map(len, pieces)),
        )

    def encode_queries(self, rows: Rows, reader: Reader) -> tuple[list[Query], int]:
        """(a query for each text, to be continued; how many were cut)."""
        writer, texts = self._decoder(reader), self._texts(rows)
        budget = writer.budget(self.spec.max_length, {"task.decode.max_new_tokens": self.spec.decode.max_new_tokens})
        found, cut = writer.prompts(texts, budget, self.spec.truncate)
        pairs = zip(texts, found, strict=True)
        return [Query(index, prompt.text, ids) for index, (prompt, ids) in enumerate(pairs)], sum(cut)

    def row_of(self, text: str) -> dict[str, Any]:
        """The row that a person means who types only a text."""
        return {self.spec.text: text}

    def _decoder(self, reader: Reader) -> Writer:
        writer = self._writer(reader)
        if writer.decoder_start is not None:
            raise ConfigError("task", self.spec.name, "plain text needs a decoder, such as model=gpt2")
        return writer

    def _texts(self, rows: Rows) -> list[Prompt]:
        texts = [cell_text(row, self.spec.text, "task.text", rows.where(index)) for index, row in enumerate(rows)]
        return [Prompt(text, ((0, len(text)),)) for text in texts]
