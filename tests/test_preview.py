"""What `lora data` shows: each token once, the mask told by words and by colour, nothing foreign that acts."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from lora_cli import preview
from lora_cli.spec import ChatSpec, ClassificationSpec, GenerationSpec
from lora_cli.tasks import build_task
from tasks.readers import READERS, reader_like, rows_of

WRITING = GenerationSpec(name="names", prompt="{a}", target="{b}", max_length=4000, max_target_length=4000)


def drawn(view: RenderableType, *, colour: bool = False, width: int = 100) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colour, color_system="truecolor" if colour else None
    )
    console.print(view)
    return console.file.getvalue()


def shown(spec, row: dict[str, object], family: str = "gpt2", *, colour: bool = False) -> str:
    task, reader = build_task(spec), reader_like(family)
    view = preview.examples_view(task.encode(rows_of(row), reader), [0], reader.tokenizer, task.labels)
    return drawn(view, colour=colour)


def lines_of(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


def test_a_decoder_reads_its_prompt_and_learns_the_answer_with_its_end() -> None:
    title, reads, learns = lines_of(shown(WRITING, {"a": "the pub", "b": " is in"}))
    assert title == "1 of 1 train examples"
    assert reads.split() == ["reads", "the", "pub", "5", "tokens"]
    assert learns.split() == ["learns", "␣is", "in<|endoftext|>", "6", "tokens"]


def test_an_encoder_decoder_reads_and_learns_apart() -> None:
    reads, learns = lines_of(shown(WRITING, {"a": "the pub", "b": "is in"}, "bart"))[1:]
    assert reads.split()[:3] == ["reads", "<s>the", "pub</s>"]
    assert learns.split()[0] == "learns"


def test_a_classified_text_has_its_label_beneath() -> None:
    spec = ClassificationSpec(name="films", labels=["bad", "good"])
    reads, label = lines_of(shown(spec, {"text": "the pub", "label": 1}))[1:]
    assert reads.split()[0] == "reads"
    assert label.split() == ["label", "good"]


def test_each_turn_of_the_assistant_is_learnt() -> None:
    talk = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b")) * 2]
    words = [
        line.split()[0] for line in lines_of(shown(ChatSpec(name="t", template="plain"), {"messages": talk})) if line
    ]
    assert [word for word in words if word in ("reads", "learns")] == ["reads", "learns", "reads", "learns"]


def test_learnt_tokens_are_in_colour_and_the_rest_is_dim() -> None:
    text = shown(WRITING, {"a": "the", "b": "in"}, colour=True)
    assert "\x1b[2mthe\x1b[0m" in text
    assert "\x1b[32min\x1b[0m" in text
    assert "\x1b[7;96m<|endoftext|>\x1b[0m" in text


def test_foreign_text_is_no_markup_and_moves_no_cursor() -> None:
    text = shown(WRITING, {"a": "[bold]x[/]\x1b[2J\r", "b": "one\ntwo\t"})
    assert "[bold]x[/]\\x1b[2J\\r" in text
    assert "one↵" in text
    assert "two→" in text
    assert "\x1b" not in text


def test_a_long_text_loses_its_middle_on_the_screen() -> None:
    text = shown(WRITING, {"a": "z" * 1000, "b": "x"})
    assert "… 840 tokens …" in text
    assert "1,000 tokens" in text
    assert text.count("z") == 160


@pytest.mark.parametrize("family", READERS)
@settings(max_examples=15, deadline=None)
@given(text=st.text(st.sampled_from("the pub é☃🙂 "), min_size=1, max_size=20))
def test_pieces_put_together_are_the_text_as_the_model_has_it(family: str, text: str) -> None:
    tokenizer = reader_like(family).tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert "".join(piece for piece, _ in preview._pieces(ids, 0, len(ids), tokenizer)) == whole


@given(share=st.floats(0, 1), width=st.integers(1, 40))
def test_a_bar_has_its_width_and_something_is_never_nothing(share: float, width: int) -> None:
    drawn_bar = preview.bar(share, width)
    assert len(drawn_bar) == width
    assert bool(drawn_bar.strip()) == (share > 0)
    assert abs(drawn_bar.count("█") - share * width) <= 1


@pytest.mark.parametrize("width", [60, 80, 200])
def test_bars_fit_into_the_terminal(width: int) -> None:
    columns = {"train": [9000, 1], "validation": [3, 4], "test": [0, 0]}
    lines = lines_of(drawn(preview._bars("labels", ["0–9", "10…"], columns, width), width=width))
    assert len(lines) == 4
    assert lines[2].endswith("0.0 %")
    assert max(map(len, lines)) <= width
