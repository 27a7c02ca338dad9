"""The page to try adapters, in a real browser: it asks the server, shows the answers, and nothing is complained of."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_cli.serving.try_page import POLICY, try_page

from .browser import CHROMIUM, visit
from .conftest import Served

ASK = """\
const form = document.querySelector('form');
form.elements.text.value = 'zzzz and aa';
form.requestSubmit();
const cards = () => [...document.querySelectorAll('article')];
while (!cards().length || cards().some(card => !card.textContent.endsWith(' ms')))
  await new Promise(done => setTimeout(done, 20));
return {width: document.documentElement.scrollWidth, cards: cards().map(card => card.innerText.split('\\n'))};
"""


def test_names_are_shown_as_they_are_and_the_script_is_the_only_one() -> None:
    page = try_page({'<b>"a"': 1, "b": 2}, writes=False)
    assert "<b>" not in page
    assert 'data-columns="2"' in page
    assert page.count("<script>") == 1
    assert "http" not in page
    assert "'unsafe-inline'" not in POLICY.partition("script-src")[2].partition(";")[0]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize(("width", "dark"), [(360, True), (1200, False)])
@pytest.mark.parametrize("kind", ["films", "talks"])
def test_a_text_is_answered_by_the_adapters_that_are_chosen(
    kind: str, width: int, dark: bool, serve: Callable[..., Served], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    server = serve(request.getfixturevalue(kind))
    found, complaints, picture = asyncio.run(visit(f"{server.url}/", ASK, tmp_path, width=width, dark=dark))
    assert not complaints, "the policy lets its script and style be, and nothing else is asked for"
    assert found["width"] <= width
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
