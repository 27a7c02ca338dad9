"""Figures of a data set, counted again in another way, and the words about them."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.spec import ClassificationSpec, DecodeSpec, GenerationSpec, LanguageModelingSpec
from lora_cli.tasks import Rows, build_task
from lora_cli.tasks.audit import Audit, Padding, SplitAudit, audit_splits, padding_share
from lora_cli.tasks.concerns import concerns
from tasks.readers import READERS, reader_like, rows_of

CLASSES = ClassificationSpec(name="films", labels=["bad", "good"], max_length=8)
WRITING = GenerationSpec(
    name="names", prompt="{a}: ", target="{b}", max_length=12, max_target_length=6, decode=DecodeSpec(max_new_tokens=5)
)
PADDING = Padding(batch_size=2, window=32, is_packed=False, planned=0.0, shuffled=0.0)


def labelled(*pairs: tuple[str, int]) -> Rows:
    return rows_of(*({"text": text, "label": label} for text, label in pairs))


def written(*pairs: tuple[str, str]) -> Rows:
    return rows_of(*({"a": a, "b": b} for a, b in pairs))


def audited(spec, splits: dict[str, Rows], family: str = "gpt2", positions: int = 64) -> Audit:
    reader = reader_like(family, max_length=positions)
    task = build_task(spec)
    limits = {name: 1000 for name in ("max_length", "max_target_length") if hasattr(spec, name)}
    endless = build_task(dataclasses.replace(spec, **limits))
    bins, found = audit_splits(
        task,
        splits,
        {name: task.encode(rows, reader) for name, rows in splits.items()},
        {name: endless.encode(rows, reader_like(family, max_length=5000)) for name, rows in splits.items()},
        positions=positions,
        unknown=reader.tokenizer.unk_token_id,
    )
    return Audit(task="x", model="y", positions=positions, bins=bins, splits=found, padding=PADDING)


@pytest.fixture
def films() -> Audit:
    train = labelled(("fine", 1), ("fine", 1), ("fine", 0), (" ", 0), ("a long film that never ends", 1))
    return audited(CLASSES, {"train": train, "validation": labelled(("fine", 1), ("new", 0))})


def test_rows_are_counted_by_what_is_wrong_with_them(films: Audit) -> None:
    train, validation = films.splits["train"], films.splits["validation"]
    assert (train.rows, train.distinct_inputs, train.repeated) == (5, 3, 2)
    assert train.contradictory == 3
    assert train.empty_inputs == 1
    assert train.empty_answers == 0
    assert train.labels == {"bad": 2, "good": 3}
    assert (train.shared, validation.shared) == ({}, {"train": 1})


def test_lengths_are_those_before_cutting_and_cuts_are_counted(films: Audit) -> None:
    part = films.splits["train"].parts["text"]
    assert part.cut == 1
    assert part.limit == 8
    assert part.tokens.most > 8
    assert sum(films.splits["train"].histogram) == 5


def test_prompts_and_answers_are_told_apart() -> None:
    rows = written(("ab", "xyz"), ("ab", "x"), ("abcdefghijkl", "pqrstuvw"), ("c", " "))
    (split,) = audited(WRITING, {"train": rows}).splits.values()
    prompt, answer = split.parts["prompt"], split.parts["answer"]
    assert (prompt.limit, answer.limit) == (12, 6)
    assert (prompt.cut, answer.cut) == (1, 1)
    assert prompt.tokens.most == len("abcdefghijkl: ")
    assert answer.tokens.most == len("pqrstuvw") + 1
    assert (split.distinct_inputs, split.empty_answers, split.empty_inputs) == (3, 1, 0)


def test_positions_leave_a_prompt_less_room_than_the_task_gives() -> None:
    (split,) = audited(WRITING, {"train": written(("abcdefgh", "x"))}, positions=14).splits.values()
    assert (split.parts["prompt"].limit, split.parts["prompt"].room) == (8, 8)
    (line,) = concerns(audited(WRITING, {"train": written(("abcdefgh", "x"))}, positions=14))
    assert line.endswith("of their prompt at 8 tokens, all that the model has positions for")


def test_unknown_text_is_counted() -> None:
    (split,) = audited(WRITING, {"train": written(("a\N{SNOWMAN}", "b"))}, "t5").splits.values()
    assert split.unknown_tokens == 1


def test_plain_text_has_one_part() -> None:
    (split,) = audited(
        LanguageModelingSpec(name="books", max_length=8), {"train": rows_of({"text": "a" * 20}, {"text": ""})}
    ).splits.values()
    assert list(split.parts) == ["text"]
    assert split.examples > split.rows == 2
    assert split.empty_inputs == 1


def test_numbers_to_predict_are_summed_up() -> None:
    spec = ClassificationSpec(name="stars", regression=True, metrics=["pearson"])
    rows = rows_of(*({"text": "x", "label": value} for value in (1.0, 2.0, 6.0)))
    (split,) = audited(spec, {"train": rows}).splits.values()
    assert split.labels is None
    assert split.values is not None
    assert (split.values.mean, split.values.median, split.values.most) == (3.0, 2.0, 6.0)


@pytest.mark.parametrize("family", READERS)
@settings(max_examples=10, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=2, max_size=9))
def test_padding_is_what_the_batches_tensors_hold(family: str, sizes: list[tuple[int, int]]) -> None:
    task = build_task(WRITING)
    rows = written(*(("a" * a, "b" * b) for a, b in sizes))
    examples = task.encode(rows, reader_like(family)).examples
    batches = [list(range(start, min(start + 3, len(examples)))) for start in range(0, len(examples), 3)]
    computed = filled = 0
    for numbers in batches:
        batch = task.collate([examples[number] for number in numbers])
        filled += int(batch["attention_mask"].sum())
        computed += batch["attention_mask"].numel()
        if "decoder_input_ids" in batch:
            filled += int((batch["labels"] != -100).sum())
            computed += batch["labels"].numel()
    assert padding_share(examples, batches) == pytest.approx(1 - filled / computed)


def test_candidate_answers_are_padded_together() -> None:
    spec = ClassificationSpec(name="plans", text=["text"], choices=["one", "two"], labels=["one", "two"])
    rows = rows_of(
        {"text": "a", "one": "b", "two": "bbbb", "label": 0}, {"text": "aa", "one": "b", "two": "b", "label": 1}
    )
    task = build_task(spec)
    examples = task.encode(rows, reader_like("bart")).examples
    mask = task.collate(examples)["attention_mask"]
    assert padding_share(examples, [[0, 1]]) == pytest.approx(1 - int(mask.sum()) / mask.numel())


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=40))
def test_every_example_is_in_one_of_a_few_bins(lengths: list[int]) -> None:
    spec = dataclasses.replace(CLASSES, max_length=4000)
    rows = labelled(*(("a" * length, number % 2) for number, length in enumerate(lengths)))
    audit = audited(spec, {"train": rows}, positions=4000)
    histogram = audit.splits["train"].histogram
    ends = [*audit.bins[1:], math.inf]
    assert len(audit.bins) <= 12
    assert histogram == [
        sum(begin <= length < end for length in lengths) for begin, end in zip(audit.bins, ends, strict=True)
    ]


def test_figures_are_plain_data(films: Audit) -> None:
    assert json.loads(json.dumps(dataclasses.asdict(films)))["splits"]["validation"]["shared"] == {"train": 1}


def changed(audit: Audit, padding: Padding = PADDING, **figures: object) -> Audit:
    """`audit` with other figures of the training rows, and nothing else to complain of."""
    quiet: dict[str, object] = {"shared": {}, "repeated": 0, "contradictory": 0, "empty_inputs": 0, "parts": {}}
    split: SplitAudit = dataclasses.replace(audit.splits["train"], **{**quiet, **figures})
    return dataclasses.replace(audit, splits={"train": split}, padding=padding)


@pytest.mark.parametrize(
    ("figures", "line"),
    [
        ({}, None),
        ({"repeated": 1}, "1 of 5 (20 %) train rows stand there more than once"),
        ({"empty_answers": 5}, "5 of 5 (100 %) train answers are empty: the model learns to say nothing"),
        ({"unlabelled": 5}, "5 of 10 (50 %) train rows have no gold label (-1) and are left out"),
        ({"labels": {"a": 9, "b": 1}}, "90 % of train are a: accuracy says little, matthews or macro_f1 more"),
        ({"labels": {"a": 5, "b": 0, "c": 5}}, "no train row has the label b: it cannot be learnt"),
    ],
)
def test_what_looks_wrong_is_said_in_one_line(films: Audit, figures: dict[str, object], line: str | None) -> None:
    assert concerns(changed(films, **figures)) == ([line] if line else [])


def test_a_cut_comes_with_the_length_that_would_do(films: Audit) -> None:
    lines = concerns(films)
    most = films.splits["train"].parts["text"].tokens.most
    assert lines[0] == (
        "1 of 5 (20 %) train examples lose some of their text at 8 tokens: "
        f"task.max_length={math.ceil(most / 8) * 8} keeps all whole"
    )
    assert lines[1] == "1 of 2 (50 %) validation inputs stand in train as well: its scores flatter"


@pytest.mark.parametrize(
    ("padding", "hint"),
    [
        ({"window": 1}, "train.length_window=32 sorts batches by length"),
        ({}, "a larger train.length_window or a smaller train.batch_size pads less"),
        ({"is_packed": True}, None),
        ({"planned": 0.1}, None),
    ],
)
def test_much_padding_comes_with_a_way_out(films: Audit, padding: dict[str, object], hint: str | None) -> None:
    found = concerns(changed(films, dataclasses.replace(PADDING, **{"planned": 0.4, **padding})))
    assert found == ([f"40 % of what the training computes is padding: {hint}"] if hint else [])
