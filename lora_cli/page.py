"""Self-contained HTML pages: no script, no network, light and dark, wide and narrow. Escapes all that it is given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from lora_cli.errors import printable

__all__ = ["Html", "command", "document", "facts", "heat_map", "paragraph", "section", "table"]

_MAX_CELL = 600
_MAX_HEADS = 80
"""Letters of a heat map's heads that fit beside each other."""
_STYLE = """\
:root { color-scheme: light dark; --ink: #1f2328; --quiet: #59636e; --line: #d1d9e0; --paper: #fff; --soft: #f6f8fa;
  --edge: rgb(31 35 40 / 30%); --c0: #0969da; --c1: #bc4c00; --c2: #1a7f37; --c3: #8250df; --c4: #bf3989; --c5: #0a7ea4;
  --c6: #9a6700; --c7: #57606a; }
@media (prefers-color-scheme: dark) { :root { --ink: #f0f6fc; --quiet: #9198a1; --line: #3d444d; --paper: #0d1117;
  --soft: #151b23; --edge: rgb(240 246 252 / 35%); --c0: #58a6ff; --c1: #f0883e; --c2: #56d364; --c3: #bc8cff;
  --c4: #ff7bac; --c5: #39c5cf; --c6: #e3b341; --c7: #b1bac4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 16px 64px; max-width: 1140px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 8px; }
p { margin: 6px 0; } .quiet, figcaption { color: var(--quiet); }
code, pre { font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px; padding: 8px 12px; overflow-x: auto;
  white-space: pre-wrap; margin: 8px 0; }
.scroll { overflow-x: auto; background:
  linear-gradient(to right, var(--paper) 40%, transparent) left / 40px 100% no-repeat local,
  linear-gradient(to left, var(--paper) 40%, transparent) right / 40px 100% no-repeat local,
  linear-gradient(to right, var(--edge), transparent) left / 14px 100% no-repeat scroll,
  linear-gradient(to left, var(--edge), transparent) right / 14px 100% no-repeat scroll; }
table { border-collapse: collapse; margin: 8px 0; font-variant-numeric: tabular-nums; overflow-wrap: break-word; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; white-space: nowrap; } td.number, th.number { text-align: right; white-space: nowrap; }
.heat td { text-align: center; padding: 5px 9px; border: 1px solid var(--paper); } tr.first td { font-weight: 600; }
.heat tr:first-child th { vertical-align: bottom; }
.upright tr:first-child th + th { writing-mode: vertical-rl; transform: rotate(180deg); padding: 5px 0 5px 5px;
  border: 0; }
.named th:first-child, .named td:first-child { position: sticky; left: 0; z-index: 1;
  max-width: 45vw; background: var(--paper); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 8px 0; }
dt { color: var(--quiet); } dd { margin: 0; } details { margin: 8px 0; } summary { cursor: pointer; }
.plot { max-width: 820px; } svg { width: 100%; min-width: 600px; height: auto; display: block; }
svg text { fill: var(--ink); font-size: 12px; } svg .tick { fill: var(--quiet); }
svg .halo { fill: var(--ink); stroke: var(--paper); stroke-width: 4px; paint-order: stroke; }
svg .grid { stroke: var(--line); } svg .upright { stroke: var(--quiet); }
svg polyline { fill: none; stroke-width: 2; } svg .best { stroke-width: 3.5; }
svg .front { stroke: var(--quiet); stroke-width: 1.5; stroke-dasharray: 2 4; } svg .bar { stroke-width: 1.5; }
svg circle, svg path { stroke: var(--paper); } svg polyline.k1 { stroke-dasharray: 8 4; }
svg polyline.k2 { stroke-dasharray: 2 3; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; padding: 0; margin: 4px 0 0; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 6px; }
.legend .k1 { border-radius: 0; } .legend .k2 { clip-path: polygon(50% 0, 100% 50%, 50% 100%, 0 50%); }
.lines i { width: 20px; height: 0; border-top: 3px solid; border-radius: 0; vertical-align: middle; }
.lines .k1 { border-top-style: dashed; } .lines .k2 { border-top-style: dotted; clip-path: none; }
"""
_COLOURED = "".join(
    f"svg polyline.c{n}, svg line.c{n} {{ stroke: var(--c{n}); }} "
    f"svg circle.c{n}, svg path.c{n} {{ fill: var(--c{n}); }} "
    f".legend i.c{n} {{ background: var(--c{n}); border-color: var(--c{n}); }}\n"
    for n in range(8)
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


class Html(str):
    """Text that is markup already. Everything else is escaped."""


def document(title: str, parts: Iterable[Html]) -> str:
    """The whole page."""
    safe = _text(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{safe}</title><style>{_STYLE}{_COLOURED}</style></head>\n<body><h1>{safe}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def section(title: str, *parts: Html, folded: bool = False) -> Html:
    """A part of the page under a heading, or one that opens on a click."""
    inside = "\n".join(parts)
    if folded:
        return Html(f"<details><summary>{_text(title)}</summary>{inside}</details>")
    return Html(f"<section><h2>{_text(title)}</h2>{inside}</section>")


def paragraph(text: str, *, quiet: bool = False) -> Html:
    """A line of text."""
    return Html(f"<p{' class=quiet' if quiet else ''}>{_text(text)}</p>")


def command(*lines: str) -> Html:
    """Command lines to be copied."""
    return Html(f"<pre>{chr(10).join(map(_text, lines))}</pre>")


def facts(rows: Iterable[tuple[str, object]]) -> Html:
    """Names and values."""
    return Html("<dl>" + "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in rows) + "</dl>")


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: bool = True, best: bool = False) -> Html:
    """Cells; with `numbers` all columns but the first to the right.

    `best`: the first row is in bold, and the first column, its names, stays where the rest scrolls.
    """

    def cell(tag: str, place: int, value: object) -> str:
        right = " class=number" if numbers and place else ""
        return f"<{tag}{right}>{_text(value)}</{tag}>"

    head = "".join(cell("th", place, value) for place, value in enumerate(heads))
    body = "".join(
        f"<tr{' class=first' if best and number == 0 else ''}>"
        + "".join(cell("td", place, value) for place, value in enumerate(row))
        + "</tr>"
        for number, row in enumerate(rows)
    )
    kind = " class=named" if best else ""
    return Html(f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def heat_map(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> Html:
    """A table whose cells are (text, how strong from 0 to 1); many heads stand upright."""
    head = "".join(f"<th>{_text(value)}</th>" for value in heads)
    body = []
    for name, cells in rows:
        shaded = "".join(
            f'<td style="background: color-mix(in srgb, var(--c0) {max(0.0, min(1.0, share)) * 70:.0f}%, transparent)">'
            f"{_text(text)}</td>"
            for text, share in cells
        )
        body.append(f"<tr><th>{_text(name)}</th>{shaded}</tr>")
    kind = "heat named upright" if sum(map(len, heads)) > _MAX_HEADS else "heat named"
    return Html(f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>{"".join(body)}</table></div>')


def _text(value: object) -> str:
    return escape(printable(value, _MAX_CELL)) if not isinstance(value, Html) else value
