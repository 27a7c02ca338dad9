"""A table that fits a terminal: what can be spared goes before anything is cut. Knows columns of text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from rich.markup import escape
from rich.table import Table

__all__ = ["fitted_table"]

_GAP = 2
_MAX_WORD = 40
"""Characters of a word that is not parted."""


def fitted_table(
    columns: Mapping[str, Sequence[str]],
    width: int,
    *,
    folds: str = "",
    left: Collection[str] = (),
    spare: Sequence[str] = (),
    styles: Sequence[str],
) -> Table:
    """`columns` by their heads, at most `width` wide, with a style for each row.

    The one that `folds` goes on in the next line between two words. It and those in `left` are texts, the others
    figures. Those in `spare` go, in this order, where there is no room for all.
    """
    widths = {head: max(map(len, (head, *cells)), default=0) for head, cells in columns.items()}
    if folds in columns:
        widths[folds] = min(max(len(word) for cell in (folds, *columns[folds]) for word in cell.split()), _MAX_WORD)
    for head in spare:
        if sum(widths.values()) + _GAP * (len(widths) - 1) > width:
            widths.pop(head, None)
    fits = sum(widths.values()) + _GAP * (len(widths) - 1) <= width
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, _GAP, 0, 0))
    for head, least in widths.items():
        if head == folds:
            table.add_column(escape(head), overflow="fold", min_width=least)
        elif head in left:
            table.add_column(escape(head), overflow="fold", no_wrap=fits)
        else:
            table.add_column(escape(head), justify="right", no_wrap=True)
    for cells, style in zip(zip(*(columns[head] for head in widths), strict=True), styles, strict=True):
        table.add_row(*map(escape, cells), style=style)
    return table
