"""Examples and figures of a data set as tables, bars and coloured text. Knows rich, tokens and audits; no rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lora_cli.errors import printable
from lora_cli.screen import significant
from lora_cli.tasks import Encoded
from lora_cli.tasks.audit import Audit
from lora_cli.tasks.sequences import IGNORED, TextExample

__all__ = [
    "bar",
    "concerns_view",
    "examples_view",
    "histogram_view",
    "labels_view",
    "padding_view",
    "rows_view",
    "tokens_view",
]

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_BAR = 24
_HEAD, _TAIL = 120, 40
"""Tokens shown of the beginning and the end of a long stretch."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_READ, _READ_MARK, _LEARNT = "dim", "magenta", ("green", "bright_cyan")
"""Styles; neighbouring tokens that are learnt differ, so that one sees where they begin."""


def examples_view(encoded: Encoded, numbers: Sequence[int], tokenizer: Any, labels: Sequence[str] | None) -> Table:
    """The examples of these `numbers`, stretch by stretch: what is only read, and what is learnt, in colour."""
    table = _table(f"{len(numbers)} of {len(encoded.examples):,} train examples", "", "", "")
    table.columns[1].justify, table.columns[1].ratio, table.columns[1].overflow = "left", 1, "fold"
    table.expand, table.show_header = True, False
    for number in numbers:
        example = encoded.examples[number]
        if table.row_count:
            table.add_row()
        for word, text, length in _stretches(example, tokenizer):
            table.add_row(word, text, f"[dim]{length:,} tokens[/]")
        if not isinstance(example, TextExample):
            name = significant(example.label) if labels is None else labels[example.label]
            table.add_row("label", Text(printable(name), _LEARNT[0]))
    return table


def rows_view(audit: Audit) -> Table:
    """Rows of each split, and what is wrong with some of them."""
    names = list(audit.splits)
    shared = names[:-1]
    # A row makes several examples where it holds several answers, or a long text.
    several = any(split.examples != split.rows for split in audit.splits.values())
    heads = ["rows", *(["examples"] if several else []), "distinct\ninputs", "repeated"]
    heads += [*(f"in\n{name}" for name in shared), "empty\ninput"]
    writes = any("answer" in split.parts or "learnt" in split.parts for split in audit.splits.values())
    table = _table("rows", "split", *heads, *(["empty\nanswer"] if writes else []))
    for column in table.columns:
        column.vertical = "bottom"
    for name, split in audit.splits.items():
        leaks = [_suspect(split.shared[other]) if other in split.shared else "" for other in shared]
        sizes = [split.rows, *([split.examples] if several else []), split.distinct_inputs]
        numbers = [*(f"{size:,}" for size in sizes), _suspect(split.repeated)]
        empty = [_suspect(split.empty_inputs), *([_suspect(split.empty_answers)] if writes else [])]
        table.add_row(escape(name), *numbers, *leaks, *empty)
    return table


def tokens_view(audit: Audit) -> Table:
    """Lengths before anything is cut, and how much is."""
    table = _table("tokens before cutting", "split", "part", "mean", "median", "95 %", "longest", "limit", "cut")
    table.columns[1].justify = "left"
    for name, split in audit.splits.items():
        for number, (part, figures) in enumerate(split.parts.items()):
            spread = figures.tokens
            lengths = [f"{spread.mean:.1f}", *(f"{value:,.0f}" for value in (spread.median, spread.p95, spread.most))]
            share = f"[yellow]{_percent(figures.cut / split.examples)}[/]" if figures.cut else "[dim]0[/]"
            table.add_row("" if number else escape(name), part, *lengths, f"{figures.limit:,}", share)
    return table


def histogram_view(audit: Audit, width: int) -> Table:
    """Examples by the tokens that the model reads, one column a split, all in `width` columns of the terminal."""
    return _bars(
        "tokens of an example",
        [_interval(begin, following) for begin, following in zip(audit.bins, [*audit.bins[1:], None], strict=True)],
        {name: split.histogram for name, split in audit.splits.items()},
        width,
    )


def labels_view(audit: Audit, width: int) -> Table | None:
    """Labels and their shares by split, or how numbers spread; None where text is learnt."""
    labelled = {name: split.labels for name, split in audit.splits.items() if split.labels is not None}
    if labelled:
        names = [printable(name, 40) for name in labelled["train"]]
        return _bars("labels", names, {split: list(counts.values()) for split, counts in labelled.items()}, width)
    valued = {name: split.values for name, split in audit.splits.items() if split.values is not None}
    if not valued:
        return None
    table = _table("numbers to predict", "split", "mean", "median", "least", "most")
    for name, values in valued.items():
        spread = (values.mean, values.median, values.least, values.most)
        table.add_row(escape(name), *(significant(value) for value in spread))
    return table


def padding_view(audit: Audit) -> Table:
    """What share of the computed positions is padding, by how batches are made."""
    padding = audit.padding
    options = {"train.packing": 0.0} if padding.is_packed else {}
    options |= {f"train.length_window={padding.window}": padding.planned, "train.length_window=1": padding.shuffled}
    chosen = next(iter(options))
    table = _table(f"padding in batches of {padding.batch_size}", "", "")
    for name, share in options.items():
        mark = "  [dim](this training)[/]" if name == chosen else ""
        table.add_row(name, f"[cyan]{bar(share, _BAR)}[/] {_percent(share)}{mark}")
    table.columns[1].justify = "left"
    table.show_header = False
    return table


def concerns_view(lines: Sequence[str]) -> Table:
    """What looks wrong, a line each."""
    table = _table("what looks wrong" if lines else "nothing looks wrong", "", "")
    table.columns[1].justify, table.show_header = "left", False
    table.columns[0].width = 1
    for line in lines:
        table.add_row("[yellow]![/]", escape(printable(line, 400)))
    return table


def bar(share: float, width: int) -> str:
    """A bar of `share` of `width` columns, to an eighth of a column; something is never nothing."""
    eighths = min(8 * width, max(round(8 * width * share), 1 if share > 0 else 0))
    full, rest = divmod(eighths, 8)
    return ("█" * full + _EIGHTHS[rest] * (rest > 0)).ljust(width)


def _table(title: str, first: str, *heads: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0), title=title, title_justify="left")
    table.title_style = "bold cyan"
    table.add_column(first, no_wrap=True)
    for head in heads:
        table.add_column(escape(head), justify="right")
    return table


def _bars(title: str, names: Sequence[str], columns: Mapping[str, Sequence[int]], width: int) -> Table:
    table = _table(title, "", *columns)
    # Beside each bar stand its share and the gap to the next column.
    room = (width - max(map(len, names))) // len(columns) - len(_percent(1) + " " + 2 * " ")
    size = max(4, min(_BAR, room))
    longest = max((max(counts) / max(1, sum(counts)) for counts in columns.values()), default=1) or 1
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "left", True
    for number, name in enumerate(names):
        cells = []
        for counts in columns.values():
            share = counts[number] / max(1, sum(counts))
            cells.append(f"[cyan]{bar(share / longest, size)}[/] {_percent(share)}")
        table.add_row(escape(name), *cells)
    return table


def _interval(begin: int, following: int | None) -> str:
    if following is None:
        return f"{begin:,}…"
    return f"{begin:,}" if following == begin + 1 else f"{begin:,}–{following - 1:,}"


def _percent(share: float) -> str:
    return f"{100 * share:5.1f} %"


def _suspect(number: int) -> str:
    return f"[yellow]{number:,}[/]" if number else "[dim]0[/]"


def _stretches(example: Any, tokenizer: Any) -> Iterator[tuple[str, Text, int]]:
    """(word, text, tokens) of each stretch of an example that is read, or learnt, as a whole."""
    if not isinstance(example, TextExample):
        for ids in example.input_ids:
            yield "reads", _text(ids, 0, len(ids), tokenizer, learnt=False), len(ids)
    elif example.decoder_start is not None:
        yield "reads", _text(example.input_ids, 0, len(example.input_ids), tokenizer, learnt=False), example.num_tokens
        yield "learns", _text(example.labels, 0, len(example.labels), tokenizer, learnt=True), len(example.labels)
    else:
        begin = 0
        for learnt, group in groupby(label != IGNORED for label in example.labels):
            length = sum(1 for _ in group)
            text = _text(example.input_ids, begin, begin + length, tokenizer, learnt=learnt)
            yield "learns" if learnt else "reads", text, length
            begin += length


def _text(ids: Sequence[int], start: int, stop: int, tokenizer: Any, *, learnt: bool) -> Text:
    """Tokens start to stop, of which the middle is left out if they are many."""
    text = Text()
    is_long = stop - start > _HEAD + _TAIL
    windows = [(start, start + _HEAD), (stop - _TAIL, stop)] if is_long else [(start, stop)]
    for number, (first, last) in enumerate(windows):
        if number:
            text.append(f" … {last - start - _HEAD - _TAIL:,} tokens … ", "dim italic")
        for place, (token, special) in enumerate(_pieces(ids, first, last, tokenizer)):
            style = _LEARNT[place % 2] if learnt else _READ
            if special:
                style = f"{style} reverse" if learnt else _READ_MARK
            text.append(_visible(token, learnt and place == 0), style)
    return text


def _pieces(ids: Sequence[int], start: int, stop: int, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """(text, whether it is a special token) of each token, of several where only together they are a character."""
    known = set(tokenizer.all_special_ids)
    # Some tokenizers drop the blank before a first token, so each is read behind the one before it.
    context = max(0, start - 1)
    before = _decoded(ids[context:start], tokenizer)
    for end in range(start + 1, stop + 1):
        text = _decoded(ids[context:end], tokenizer)
        if text.endswith(_REPLACEMENT) and end < stop:
            continue
        yield text[len(before) :], ids[end - 1] in known
        before = text


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _visible(text: str, first: bool) -> str:
    """Text that shows its line breaks, and a blank with which an answer begins, and moves no cursor."""
    lines = [printable(line.replace("\t", "→"), 2000) for line in text.split("\n")]
    shown = "↵\n".join(lines)
    return "␣" + shown[1:] if first and shown.startswith(" ") else shown
