"""A page lets nothing through that could run, load or be taken for markup."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from lora_cli import page

NASTY = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x1b[31m\u202e"


class Tags(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(html: str) -> Tags:
    parser = Tags()
    parser.feed(html)
    return parser


def everything(text: str) -> str:
    return page.document(
        text,
        [
            page.section(text, page.paragraph(text), page.command(text), folded=True),
            page.facts([(text, text)]),
            page.table([text], [[text]]),
            page.heat_map([text], [(text, [(text, 0.5)])]),
        ],
    )


@given(st.text(max_size=60))
def test_no_text_becomes_a_tag(text: str) -> None:
    assert [tag for tag, _ in parsed(everything(text)).tags] == [tag for tag, _ in parsed(everything("a")).tags]


def test_foreign_text_is_shown_as_it_is_without_what_turns_it_around() -> None:
    found = parsed(everything(NASTY))
    assert not {"script", "img"} & {tag for tag, _ in found.tags}
    assert "<script>alert(1)</script>" in found.text
    assert "\x1b" not in found.text
    assert "\u202e" not in found.text


def test_the_page_forbids_itself_scripts_and_the_network() -> None:
    found = parsed(everything("a"))
    (policy,) = [attrs["content"] for tag, attrs in found.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert not [attrs for _, attrs in found.tags if "src" in attrs]
    assert [attrs["href"] for _, attrs in found.tags if "href" in attrs] == ["data:,"], "no icon is asked for"
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.tags


def test_many_heads_stand_upright_and_few_do_not() -> None:
    labels = [f"label_{number:03}" for number in range(12)]
    many, few = (page.heat_map(heads, [("x", [("1", 0.5)])]) for heads in (["", *labels], ["", *labels[:3]]))
    assert "upright" in many
    assert "upright" not in few


def test_the_best_row_and_a_full_cell_stand_out() -> None:
    assert parsed(page.table(["a", "b"], [["x", 1], ["y", 2]], best=True)).tags.count(("tr", {"class": "first"})) == 1
    strong, weak = (page.heat_map(["a"], [("x", [("1", share)])]) for share in (2.0, -1.0))
    assert " 70%," in strong
    assert " 0%," in weak
