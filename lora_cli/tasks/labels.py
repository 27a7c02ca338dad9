"""How a cell becomes a label: names, ids, numbers. Knows rows; nothing of text or tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from lora_cli.errors import DataError, printable
from lora_cli.tasks.rows import Rows, unknown

__all__ = ["Cell", "label_cells", "label_ids", "label_names", "label_numbers"]

Cell = str | int | bool
"""A label as data writes it."""

_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_FRACTION = re.compile(r"-?[0-9]*\.[0-9]+([eE][-+]?[0-9]+)?")


def label_cells(rows: Rows, column: str) -> list[Cell]:
    """The labels of all rows as they stand: all of one type, text, whole numbers or true and false.

    Raises:
        DataError: a label is missing, null, NaN, empty, a fraction or a list, or of another type than the first.
    """
    cells = [_present(row, column, rows, index) for index, row in enumerate(rows)]
    for index, cell in enumerate(cells):
        if type(cell) is not type(cells[0]):
            said = f"label {printable(cell, 40)} is {_kind(cell)}, but the first one"
            raise DataError(rows.where(index), f"{said} ({rows.where(0)}) is {_kind(cells[0])}")
        if not isinstance(cell, (str, int)):
            hint = "; for numbers to predict, set task.regression=true" if isinstance(cell, float) else ""
            raise DataError(rows.where(index), f"label {printable(cell, 40)} is {_kind(cell)}, not a class{hint}")
    return [cell for cell in cells if isinstance(cell, (str, int))]


def label_names(cells: Iterable[Cell], where: str) -> tuple[str, ...]:
    """The distinct labels as names in the order of their ids: numbers by value, false before true, text sorted.

    Raises:
        DataError: they are numbers with fractions, as text.
    """
    names = {_name(cell) for cell in cells}
    if all(_INTEGER.fullmatch(name) for name in names):
        return tuple(sorted(names, key=int))
    if all(_INTEGER.fullmatch(name) or _FRACTION.fullmatch(name) for name in names):
        raise DataError(where, "the labels are numbers with fractions; to predict numbers, set task.regression=true")
    return tuple(sorted(names))


def label_ids(cells: Sequence[Cell], names: Sequence[str], rows: Rows) -> list[int]:
    """Ids of labels in `names`. A label that is a name stands for it; 1, "1" or true stands for the id 1, unless the
    names are numbers themselves.

    Raises:
        DataError: a label is neither.
    """
    ids = {name: number for number, name in enumerate(names)}
    said = {name.lower(): number for name, number in ids.items()}
    if any(isinstance(cell, bool) for cell in cells) and said.keys() & {"true", "false"}:
        ids = said
    elif not any(_INTEGER.fullmatch(name) for name in names):
        ids = {str(number): number for number in range(len(names))} | ids
        if len(names) == 2:
            ids = {"false": 0, "true": 1} | ids
    found = []
    for index, cell in enumerate(cells):
        number = ids.get(_name(cell))
        if number is None:
            raise unknown(rows.where(index), "label", cell, names)
        found.append(number)
    return found


def label_numbers(rows: Rows, column: str) -> list[float]:
    """The labels of a regression task.

    Raises:
        DataError: a label is not a finite number.
    """
    return [_number(_present(row, column, rows, index), rows, index) for index, row in enumerate(rows)]


def _present(row: dict[str, object], column: str, rows: Rows, index: int) -> object:
    if column not in row:
        everywhere = column not in rows.columns
        where = rows.source if everywhere else rows.where(index)
        raise unknown(where, "column (task.label)", column, rows.columns if everywhere else row)
    cell = row[column]
    if cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell)):
        raise DataError(rows.where(index), f"the label (column '{printable(column, 40)}') is {_kind(cell)}")
    return cell


def _number(cell: object, rows: Rows, index: int) -> float:
    try:
        number = math.nan if isinstance(cell, bool) or not isinstance(cell, (str, int, float)) else float(cell)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(rows.where(index), f"label '{printable(cell, 40)}' is not a number (task.regression=true)")
    return number


def _name(cell: Cell) -> str:
    return str(cell).lower() if isinstance(cell, bool) else str(cell)


def _kind(cell: object) -> str:
    if cell is None or cell == "":
        return "null" if cell is None else "empty"
    if isinstance(cell, float):
        return "NaN" if math.isnan(cell) else "a number with a fraction"
    return {str: "text", bool: "true/false", int: "a whole number", list: "a list", dict: "an object"}.get(
        type(cell), type(cell).__name__
    )
