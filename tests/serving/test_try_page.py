"""The page to try adapters, in a real browser: it asks the server, shows the answers, and nothing is complained of."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_cli.serving.try_page import POLICY, try_page

from .browser import CHROMIUM, visit
from .conftest import Served

UNTIL = "const until = async test => { while (!test()) await new Promise(done => setTimeout(done, 20)); };"
ASK = """\
const form = document.getElementById('try'), cards = () => [...document.querySelectorAll('article')];
await until(() => !form.hidden);
form.elements.text.value = 'zzzz and aa\\n';
form.requestSubmit();
const wasIdle = !form.elements.go.disabled;
await until(() => cards().length && cards().every(card => card.textContent.endsWith(' ms')));
await until(() => !form.elements.go.disabled);
return {width: document.documentElement.scrollWidth, wasIdle, about: document.getElementById('about').textContent,
  cards: cards().map(card => card.innerText.split('\\n'))};
"""
TOKEN = "0123456789abcdef-secret"
USE_TOKENS = """\
const key = document.getElementById('key'), told = [], about = document.getElementById('about');
for (const token of ['of another server', TOKEN]) {
  await until(() => !key.hidden && about.textContent !== 'reading …');
  const before = about.textContent;
  told.push(before);
  key.elements.token.value = token;
  key.requestSubmit();
  await until(() => about.textContent !== before);
}
await until(() => key.hidden);
""".replace("TOKEN", repr(TOKEN))
FAIL = """\
await until(() => !document.getElementById('try').hidden);
window.fetch = () => Promise.reject(new TypeError('gone'));
const form = document.getElementById('try');
form.elements.text.value = 'aa';
form.elements.none.click();
form.requestSubmit();
const none = document.getElementById('answers').innerText;
form.elements.all.click();
form.requestSubmit();
await until(() => document.querySelectorAll('article .wrong').length === form.elements.models.elements.length);
return [none, document.querySelector('article .wrong').innerText];
"""


def test_the_page_names_no_adapter_and_the_script_is_the_only_one() -> None:
    page = try_page()
    assert page.count("<script>") == 1
    assert "http" not in page
    assert "innerHTML" not in page, "names are shown as they are"
    assert "'unsafe-inline'" not in POLICY.partition("script-src")[2].partition(";")[0]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize(("width", "dark"), [(360, True), (1200, False)])
@pytest.mark.parametrize("kind", ["films", "talks"])
def test_a_text_is_answered_by_the_adapters_that_are_chosen(
    kind: str, width: int, dark: bool, serve: Callable[..., Served], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    server = serve(request.getfixturevalue(kind))
    found, complaints, picture = asyncio.run(visit(f"{server.url}/", UNTIL + ASK, tmp_path, width=width, dark=dark))
    assert not complaints, "the policy lets its script and style be, and nothing else is asked for"
    assert found["width"] <= width
    assert not found["wasIdle"], "one question at a time"
    assert found["about"].startswith(f"{len(server.pool.entries)} adapters on one base")
    chosen = list(server.pool.entries)[:4]
    assert [card[0] for card in found["cards"]] == chosen
    for name, card in zip(chosen, found["cards"], strict=True):
        if kind == "films":
            assert card[2] == server.classify(name, "zzzz and aa")[0]["label"]
        else:
            body = {"model": name, "prompt": "zzzz and aa"}
            written = server.post("/v1/completions", body).body["choices"][0]["text"]
            assert "".join(written.split())[:5] in "".join("".join(card).split())
    assert picture.startswith(b"\x89PNG")
    (tmp_path / "page.png").write_bytes(picture)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_token_is_asked_for_and_borne(films: Path, serve: Callable[..., Served], tmp_path: Path) -> None:
    server = serve(films, token=TOKEN)
    script = UNTIL + USE_TOKENS + ASK.replace("return {", "return {told, ")
    found, complaints, _ = asyncio.run(visit(f"{server.url}/", script, tmp_path, width=390))
    assert found["told"] == ["This server asks for a token", "Not the token of this server"]
    assert len(found["cards"]) == 4
    assert len(complaints) == 2, "the two that were refused"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_what_fails_looks_like_it(films: Path, serve: Callable[..., Served], tmp_path: Path) -> None:
    server = serve(films)
    found, _, _ = asyncio.run(visit(f"{server.url}/", UNTIL + FAIL, tmp_path, width=390))
    assert found == ["Choose an adapter.", "The server does not answer."]
