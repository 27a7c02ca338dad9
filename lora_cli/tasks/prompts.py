"""From a row to a prompt and its answers: templates, and the structured data that becomes text. No tokens yet."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_cli.errors import DataError, printable
from lora_cli.tasks.rows import Rows, unknown
from lora_cli.tasks.text import linearise_dart, linearise_e2e, linearise_webnlg, webnlg_group

__all__ = ["FORMATS", "Prompt", "Template", "cell_text", "clean", "reformatted"]

_FIELD = re.compile(r"\{([^{}]+)\}")
_OPTIONAL = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_END = "{eos}"
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Prompt:
    """A rendered template, and where in it the cells stand: what may be cut, which the template's own words may not."""

    text: str
    cells: tuple[tuple[int, int], ...]
    """(start, end) in characters of each cell, in the order of the text."""
    ends: bool = False
    """Whether the model's end mark follows."""


class Template:
    """Text with cells of a row in it: `{column}`. A part in `[[ ]]` is left out where one of its cells is empty, and
    `{eos}` at the end is the model's end mark.

    Not str.format: a template may come with somebody's run, and format reads attributes.
    """

    def __init__(self, text: str, key: str) -> None:
        self._ends = text.endswith(_END)
        text = text.removesuffix(_END)
        self.text, self._key = text, key
        self._parts: list[tuple[bool, str]] = []
        end = 0
        for match in _OPTIONAL.finditer(text):
            self._parts += [(False, text[end : match.start()]), (True, match[1])]
            end = match.end()
        self._parts.append((False, text[end:]))

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the template reads, each once."""
        return tuple(dict.fromkeys(_FIELD.findall(self.text)))

    @property
    def required(self) -> tuple[str, ...]:
        """Those that a row must have: they stand outside of `[[ ]]`."""
        return tuple(
            dict.fromkeys(name for optional, text in self._parts if not optional for name in _FIELD.findall(text))
        )

    def render(self, row: Mapping[str, Any], where: str) -> Prompt:
        """The template with the cells of `row`, which must be texts.

        Raises:
            DataError: a cell is missing, or no text; names `where`.
        """
        text, cells = "", []
        for optional, part in self._parts:
            names = _FIELD.findall(part)
            if optional and not all(row.get(name) for name in names):
                continue
            end = 0
            for match in _FIELD.finditer(part):
                text += part[end : match.start()]
                cell = cell_text(row, match[1], self._key, where)
                cells.append((len(text), len(text) + len(cell)))
                text += cell
                end = match.end()
            text += part[end:]
        return Prompt(text, tuple(cells), self._ends)


def cell_text(row: Mapping[str, Any], column: str, key: str, where: str) -> str:
    """The text in `column`, which the config key `key` names.

    Raises:
        DataError: the cell is missing, or no text; names `where`.
    """
    if column not in row:
        raise unknown(where, f"column ({key})", column, row)
    cell = row[column]
    if not isinstance(cell, str):
        kind = "null" if cell is None else type(cell).__name__
        raise DataError(where, f"column '{printable(column, 40)}' holds {kind}, not text")
    return clean(cell)


def clean(text: str) -> str:
    """Text that UTF-8 can write: half of a character pair, which JSON can hold, becomes the replacement character."""
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def reformatted(rows: Rows, name: str) -> Rows:
    """`rows` with the columns that format `name` makes of the structured ones, and their places kept.

    Raises:
        DataError: a column that the format reads is missing, or not of its shape; names the row.
    """
    if name == "columns":
        return rows
    made = FORMATS[name]
    records = []
    for index, row in enumerate(rows):
        if made.source not in row:
            raise unknown(rows.where(index), f"column (task.format={name})", made.source, row)
        try:
            records.append({**row, **made.read(row)})
        except DataError as error:
            raise DataError(rows.where(index), str(error)) from error
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            shape = f"column '{made.source}' is not of the shape that task.format={name} reads"
            raise DataError(rows.where(index), shape) from error
    return rows.replaced(records)


@dataclass(frozen=True)
class _Format:
    """How the rows of a data set become text columns."""

    source: str
    """The column of structured data; alone it makes `input`."""
    answer: tuple[str, ...]
    """The columns that make `target`."""
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    """A row → input, target (a text or a list of texts; absent where the row has none), and group."""


def _e2e(row: Mapping[str, Any]) -> dict[str, Any]:
    target = {"target": row["human_reference"]} if "human_reference" in row else {}
    return {"input": linearise_e2e(row["meaning_representation"]), **target}


def _webnlg(row: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {"input": _triples(row["modified_triple_sets"], linearise_webnlg, "mtriple_set")}
    if "lex" in row:
        comments, texts = row["lex"]["comment"], row["lex"]["text"]
        good = [text for text, comment in zip(texts, comments, strict=True) if comment == "good"]
        made["target"] = good or list(texts)
    if "category" in row:
        made["group"] = webnlg_group(row["category"])
    return made


def _dart(row: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {"input": _triples(row["tripleset"], linearise_dart)}
    return made | ({"target": list(row["annotations"]["text"])} if "annotations" in row else {})


def _triples(cell: Any, linearise: Callable[[Sequence[Any]], str], key: str | None = None) -> str:
    # A text is what a person types for `lora infer prompt=`: one triple, or several, already in a line.
    if isinstance(cell, str):
        return cell
    return linearise(cell[key][0] if key else cell)


FORMATS: dict[str, _Format] = {
    "e2e": _Format("meaning_representation", ("human_reference",), _e2e),
    "webnlg": _Format("modified_triple_sets", ("lex",), _webnlg),
    "dart": _Format("tripleset", ("annotations",), _dart),
}
"""task.format → how its rows become text; `columns` leaves them as they are."""
