"""The pages of a server: one to try adapters side by side, one that describes its routes. Nothing from elsewhere, and
nothing of the adapters, which the page asks for as every client does.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lora_cli.page import document, facts, paragraph, section

__all__ = ["POLICY", "api_page", "try_page"]

_STYLE = """\
:root { color-scheme: light dark; --ink: #1f2328; --quiet: #59636e; --line: #d1d9e0; --paper: #fff; --soft: #f6f8fa;
  --bar: #0969da; --wrong: #d1242f; }
@media (prefers-color-scheme: dark) { :root { --ink: #f0f6fc; --quiet: #9198a1; --line: #3d444d; --paper: #0d1117;
  --soft: #151b23; --bar: #58a6ff; --wrong: #f85149; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 16px 64px; max-width: 1100px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 15px; margin: 0 0 6px; } p { margin: 4px 0; }
.quiet { color: var(--quiet); } a { color: inherit; } [hidden] { display: none !important; }
.wrong { color: var(--wrong); border-left: 3px solid var(--wrong); padding-left: 8px; }
textarea, input:not([type=checkbox]) { padding: 8px 10px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--soft); color: inherit; font: inherit; }
textarea { display: block; width: 100%; min-height: 90px; } input[type=number] { width: 90px; padding: 5px 8px; }
input[type=password] { width: 100%; }
fieldset { border: 1px solid var(--line); border-radius: 6px; margin: 10px 0; padding: 6px 12px; max-height: 180px;
  overflow-y: auto; display: flex; flex-wrap: wrap; gap: 2px 18px; min-width: 0; }
.line { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 14px; margin: 8px 0; }
button { font: inherit; padding: 6px 18px; border: 1px solid var(--line); border-radius: 6px; background: var(--soft);
  color: inherit; cursor: pointer; } button:disabled { opacity: .55; cursor: default; }
button.small { padding: 1px 10px; color: var(--quiet); } input { accent-color: var(--bar); }
#answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 12px;
  margin-top: 16px; }
article { border: 1px solid var(--line); border-radius: 6px; padding: 10px 14px; min-width: 0; }
.text { white-space: pre-wrap; } .row { display: grid; grid-template-columns: 1fr auto; gap: 0 10px; }
.track { grid-column: 1 / -1; height: 6px; border-radius: 3px; background: var(--soft); overflow: hidden; }
.fill { height: 100%; background: var(--bar); }
"""
_SCRIPT = """\
const form = document.getElementById('try'), answers = document.getElementById('answers');
const about = document.getElementById('about'), key = document.getElementById('key');
const {text, models, settings, go} = form.elements;
let adapters = [], token = '';
function make(parent, tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}
async function ask(path, body) {
  const headers = token ? {authorization: 'Bearer ' + token} : {};
  const sent = body && {method: 'POST', body: JSON.stringify(body)};
  const answer = await fetch(path, {...sent, headers: {...headers, ...body && {'content-type': 'application/json'}}})
    .catch(() => { throw new Error('The server does not answer.'); });
  if (answer.ok) return answer;
  if (answer.status === 401) key.hidden = false;
  throw new Error(await answer.json().then(told => told.error.message, () => 'The server answered ' + answer.status));
}
async function list() {
  adapters = (await (await ask('/v1/models')).json()).data;
  const named = adapters.length === 1 ? '1 adapter' : adapters.length + ' adapters';
  const writes = adapters.some(each => each.writes);
  about.className = 'quiet';
  about.textContent = adapters.length === 1 ? named : named + ' on one base, side by side';
  models.replaceChildren();
  for (const [place, each] of adapters.entries()) {
    const label = make(models, 'label'), box = make(label, 'input');
    Object.assign(box, {type: 'checkbox', value: each.id, checked: place < 4});
    label.append(' ' + each.id);
    if (each.columns.length > 1) make(label, 'span', 'quiet', ' ' + each.columns.join(', '));
  }
  const several = adapters.some(each => each.columns.length > 1) && !writes;
  text.placeholder = writes ? 'A prompt.' : several ? 'A text; for several columns, one a line.' : 'A text.';
  go.textContent = writes ? 'Write' : 'Classify';
  settings.hidden = !writes;
  key.hidden = true;
  form.hidden = false;
}
function listed(told) {
  return list().catch(error => {
    about.className = told || key.hidden ? 'wrong' : 'quiet';
    const asked = told ? 'Not the token of this server' : 'This server asks for a token';
    about.textContent = key.hidden ? error.message : asked;
  });
}
async function classify(adapter, given, card) {
  const cells = given.split('\\n');
  const answer = await ask('/v1/classify', {model: adapter.id, input: [adapter.columns.length > 1 ? cells : given]});
  const found = (await answer.json()).data[0];
  if (adapter.labels === null) { make(card, 'p', 'text', String(Number(found.value.toPrecision(6)))); return; }
  make(card, 'p', 'text', found.label);
  const sorted = Object.entries(found.probabilities).sort((a, b) => b[1] - a[1]).slice(0, 6);
  for (const [label, share] of sorted) {
    const row = make(card, 'div', 'row');
    make(row, 'span', 'quiet', label);
    make(row, 'span', 'quiet', (100 * share).toFixed(1) + ' %');
    make(make(row, 'div', 'track'), 'div', 'fill').style.width = 100 * share + '%';
  }
}
async function write(adapter, given, card) {
  const chosen = {};
  for (const field of settings.querySelectorAll('input')) if (field.value) chosen[field.name] = Number(field.value);
  const answer = await ask('/v1/completions', {model: adapter.id, prompt: given, stream: true, ...chosen});
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
async function answered(adapter, given) {
  const card = make(answers, 'article'), started = performance.now();
  make(card, 'h2', '', adapter.id);
  const waits = make(card, 'p', 'quiet', adapter.writes ? 'writing …' : 'reading …');
  await (adapter.writes ? write : classify)(adapter, given, card)
    .catch(error => make(card, 'p', 'wrong', error.message));
  waits.textContent = Math.round(performance.now() - started) + ' ms';
  card.append(waits);
}
form.addEventListener('submit', async submitted => {
  submitted.preventDefault();
  if (go.disabled) return;
  const names = [...models.querySelectorAll('input:checked')].map(box => box.value);
  const given = text.value.replace(/\\n+$/, '');
  answers.replaceChildren();
  if (!names.length) { make(answers, 'p', 'wrong', 'Choose an adapter.'); return; }
  go.disabled = true;
  await Promise.all(adapters.filter(each => names.includes(each.id)).map(each => answered(each, given)));
  go.disabled = false;
});
for (const button of form.querySelectorAll('button.small')) button.addEventListener('click', () => {
  for (const box of models.querySelectorAll('input')) box.checked = button.name === 'all';
});
key.addEventListener('submit', submitted => {
  submitted.preventDefault();
  token = key.elements.token.value.trim();
  listed(true);
});
listed(false);
"""


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; script-src {_hash(_SCRIPT)}; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The one script of ours, told by its hash, and nothing else; it may ask this server only."""
_BODY = """\
<h1>lora serve</h1>
<p><span id="about" class="quiet">reading …</span> <span class="quiet">· <a href="/docs">The API</a></span></p>
<form id="key" class="line" hidden><input type="password" name="token" aria-label="token" placeholder="The token"
  autocomplete="off" required><button>Use it</button></form>
<form id="try" hidden><textarea name="text" aria-label="text" required></textarea>
<fieldset name="models" aria-label="adapters"></fieldset>
<fieldset name="settings" aria-label="settings" hidden>
<label>temperature <input type="number" name="temperature" min="0" max="2" step="any" placeholder="its own"></label>
<label>max_tokens <input type="number" name="max_tokens" min="1" placeholder="its own"></label></fieldset>
<div class="line"><button name="go">Classify</button>
<button type="button" class="small" name="all">all adapters</button>
<button type="button" class="small" name="none">none</button></div></form>
<div id="answers" aria-live="polite"></div>
"""


def try_page() -> str:
    """A text field, the adapters to choose from, and what each makes of the text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>lora serve</title><style>{_STYLE}</style></head>\n"
        f"<body>{_BODY}<script>{_SCRIPT}</script></body></html>\n"
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
