"""The pages of a server: one to try adapters side by side, one that describes its routes. Nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from typing import Any

from lora_cli.page import document, facts, paragraph, section

__all__ = ["POLICY", "api_page", "try_page"]

_STYLE = """\
:root { color-scheme: light dark; --ink: #1f2328; --quiet: #59636e; --line: #d1d9e0; --paper: #fff; --soft: #f6f8fa;
  --bar: #0969da; }
@media (prefers-color-scheme: dark) { :root { --ink: #f0f6fc; --quiet: #9198a1; --line: #3d444d; --paper: #0d1117;
  --soft: #151b23; --bar: #58a6ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 16px 64px; max-width: 1100px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 15px; margin: 0 0 6px; } p { margin: 4px 0; }
.quiet { color: var(--quiet); } a { color: inherit; }
textarea { width: 100%; min-height: 90px; padding: 8px 10px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--soft); color: inherit; font: inherit; }
fieldset { border: 1px solid var(--line); border-radius: 6px; margin: 10px 0; padding: 6px 12px; max-height: 180px;
  overflow-y: auto; display: flex; flex-wrap: wrap; gap: 2px 18px; }
button { font: inherit; padding: 6px 18px; border: 1px solid var(--line); border-radius: 6px; background: var(--soft);
  color: inherit; cursor: pointer; }
#answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 12px;
  margin-top: 16px; }
article { border: 1px solid var(--line); border-radius: 6px; padding: 10px 14px; min-width: 0; }
.text { white-space: pre-wrap; } .row { display: grid; grid-template-columns: 1fr auto; gap: 0 10px; }
.track { grid-column: 1 / -1; height: 6px; border-radius: 3px; background: var(--soft); overflow: hidden; }
.fill { height: 100%; background: var(--bar); }
"""
_SCRIPT = """\
const form = document.querySelector('form'), answers = document.getElementById('answers');
const writes = document.body.dataset.kind === 'writes';
function make(parent, tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}
async function post(path, body) {
  const answer = await fetch(path, {method: 'POST', headers: {'content-type': 'application/json'},
    body: JSON.stringify(body)});
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  return answer;
}
async function classify(model, text, card, columns) {
  const answer = await post('/v1/classify', {model, input: [columns > 1 ? text.split('\\n') : text]});
  const found = (await answer.json()).data[0];
  if (found.value !== undefined) { make(card, 'p', 'text', String(found.value)); return; }
  make(card, 'p', 'text', found.label);
  const sorted = Object.entries(found.probabilities).sort((a, b) => b[1] - a[1]).slice(0, 6);
  for (const [label, share] of sorted) {
    const row = make(card, 'div', 'row');
    make(row, 'span', 'quiet', label);
    make(row, 'span', 'quiet', (100 * share).toFixed(1) + ' %');
    make(make(row, 'div', 'track'), 'div', 'fill').style.width = 100 * share + '%';
  }
}
async function write(model, text, card) {
  const answer = await post('/v1/completions', {model, prompt: text, stream: true});
  const shown = make(card, 'p', 'text', ''), reader = answer.body.getReader(), decoder = new TextDecoder();
  let rest = '';
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const events = (rest + decoder.decode(value, {stream: true})).split('\\n\\n');
    rest = events.pop();
    for (const each of events.map(line => line.slice(6)).filter(line => line !== '[DONE]')) {
      const told = JSON.parse(each);
      if (told.error) throw new Error(told.error.message);
      for (const choice of told.choices) shown.textContent += choice.text;
    }
  }
}
form.addEventListener('submit', submitted => {
  submitted.preventDefault();
  answers.replaceChildren();
  const text = form.elements.text.value;
  for (const box of form.querySelectorAll('input:checked')) {
    const card = make(answers, 'article'), started = performance.now();
    make(card, 'h2', '', box.value);
    (writes ? write : classify)(box.value, text, card, box.dataset.columns)
      .catch(error => make(card, 'p', 'quiet', error.message))
      .finally(() => make(card, 'p', 'quiet', Math.round(performance.now() - started) + ' ms'));
  }
});
"""


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; script-src {_hash(_SCRIPT)}; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The one script of ours, told by its hash, and nothing else; it may ask this server only."""
_SHOWN = 4
"""Adapters that are chosen at first."""


def try_page(columns: Mapping[str, int], *, writes: bool) -> str:
    """A text field, the adapters to choose from, and what each makes of the text. `columns`: how many each reads."""
    boxes = "".join(
        f'<label><input type="checkbox" name="model" value="{escape(name)}" data-columns="{number}"'
        f"{' checked' * (place < _SHOWN)}> {escape(name)}</label>"
        for place, (name, number) in enumerate(columns.items())
    )
    hint = "A prompt." if writes else "A text; of a task that reads several columns, one a line."
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>lora serve</title><style>{_STYLE}</style></head>\n"
        f'<body data-kind="{"writes" if writes else "classifies"}"><h1>lora serve</h1>\n'
        f'<p class="quiet">{len(columns)} adapters on one base, side by side. <a href="/docs">The API</a></p>\n'
        f'<form><textarea name="text" aria-label="text" placeholder="{hint}" required></textarea>'
        f"<fieldset>{boxes}</fieldset><button>{'Write' if writes else 'Classify'}</button></form>\n"
        f'<div id="answers" aria-live="polite"></div>\n<script>{_SCRIPT}</script></body></html>\n'
    )


def api_page(description: Mapping[str, Any]) -> str:
    """An OpenAPI description to read."""
    parts = [paragraph("Every request and answer is JSON; /openapi.json is the same for programs.", quiet=True)]
    schemas = description.get("components", {}).get("schemas", {})
    for path, methods in description["paths"].items():
        for method, about in methods.items():
            lines = [paragraph(f"{about['summary']}. {about.get('description', '')}")]
            content = about.get("requestBody", {}).get("content", {}).get("application/json", {})
            name = str(content.get("schema", {}).get("$ref", "")).rpartition("/")[2]
            if name in schemas:
                needed = schemas[name].get("required", [])
                fields = schemas[name]["properties"].items()
                lines.append(facts([(key + " *" * (key in needed), _said(about)) for key, about in fields]))
            parts.append(section(f"{method.upper()} {path}", *lines))
    return document("lora serve: the API", parts)


def _said(field: Mapping[str, Any]) -> str:
    known = {key: value for key, value in field.items() if key not in ("title", "description")}
    said = str(field.get("description", ""))
    return f"{said}  {json.dumps(known)}".strip()
