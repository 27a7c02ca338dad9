"""Prompts with answers: what is learnt, what is asked, and the loss, against independent formulations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.engine.evaluate import forward
from lora_cli.errors import ConfigError, DataError
from lora_cli.spec import DecodeSpec, GenerationSpec
from lora_cli.tasks import build_task
from lora_cli.tasks.generation import Generation
from lora_cli.tasks.rows import Rows
from lora_cli.tasks.sequences import IGNORED, TextExample
from lora_cli.unpadded import remove_padding
from nn.models import tiny_lm
from tasks.readers import DECODERS, READERS, Reader, reader_like, rows_of


def task_of(**values: object) -> Generation:
    return Generation(GenerationSpec(name="t", **{"prompt": "Say {a}[[ or {b}]]:", "target": " {t}", **values}))


@pytest.fixture(scope="module", params=READERS)
def reader(request: pytest.FixtureRequest) -> Reader:
    return reader_like(request.param)


cells = st.text(st.sampled_from("the in an xyz é😀<>s|{}[]\n"), max_size=25)
lengths = {"max_length": st.integers(8, 40), "max_target_length": st.integers(3, 12)}


@settings(max_examples=60, deadline=None)
@given(a=cells, b=cells, t=cells, side=st.sampled_from(["left", "right"]), **lengths)
def test_exactly_the_answer_is_learnt_and_asked_for_as_it_is_learnt(
    reader: Reader, a: str, b: str, t: str, side: str, max_length: int, max_target_length: int
) -> None:
    task = task_of(truncate=side, max_length=max_length, max_target_length=max_target_length)
    row = {"a": a, "b": b, "t": t}
    encoded = task.encode(rows_of(row), reader)
    ((example,), (query,)) = encoded.examples, encoded.queries
    ((asked,), _) = task.encode_queries(rows_of({"a": a, "b": b}), reader)
    assert asked.input_ids == query.input_ids
    assert len(query.input_ids) <= max_length
    target = [label for label in example.labels if label != IGNORED]
    assert target[-1] == reader.eos
    assert len(target) <= max_target_length
    if reader.decoder_start is None:
        assert example.input_ids == query.input_ids + target
        assert example.labels == [IGNORED] * len(query.input_ids) + target
    else:
        assert (example.input_ids, example.labels) == (query.input_ids, target)
    if not encoded.num_cut_targets:
        ids = reader.tokenizer(f" {t}", add_special_tokens=False)["input_ids"]
        assert target[len(target) - len(ids) - 1 : -1] == ids


@pytest.mark.parametrize("family", DECODERS)
def test_the_prompt_is_learnt_too_where_that_is_asked_for(family: str) -> None:
    reader = reader_like(family)
    (example,) = task_of(loss_on="all").encode(rows_of({"a": "x", "b": "", "t": "y"}), reader).examples
    assert example.labels == [IGNORED, *example.input_ids[1:]]
    with pytest.raises(ConfigError, match=r"task\.loss_on=all: only with a decoder"):
        task_of(loss_on="all").encode(rows_of({"a": "x", "b": "", "t": "y"}), reader_like("t5"))


def test_references_of_equal_prompts_meet_in_one_query() -> None:
    rows = rows_of(
        {"a": "x", "b": None, "t": ["1", "2"]}, {"a": "y", "b": "", "t": ["3"]}, {"a": "x", "b": "", "t": " 4 "}
    )
    encoded = task_of().encode(rows, reader_like("gpt2"))
    assert [query.references for query in encoded.queries] == [["1", "2", "4"], ["3"]]
    assert [query.index for query in encoded.queries] == [0, 1]
    assert [example.index for example in encoded.examples] == [0, 1, 2, 3]


def test_what_was_cut_and_what_is_empty_is_counted() -> None:
    rows = rows_of({"a": "x" * 40, "b": "", "t": "y" * 40}, {"a": "x", "b": "", "t": " "})
    encoded = task_of(max_length=20, max_target_length=9).encode(rows, reader_like("gpt2"))
    assert (encoded.num_truncated, encoded.num_cut_targets, encoded.num_empty) == (1, 1, 1)
    assert encoded.num_tokens == sum(len(example.input_ids) for example in encoded.examples)


def test_a_group_is_a_text_of_the_row() -> None:
    encoded = task_of(group="g").encode(rows_of({"a": "x", "b": "", "t": "y", "g": 3}), reader_like("gpt2"))
    assert encoded.queries[0].group == "3"
    with pytest.raises(DataError, match=r"data\.jsonl:1: no column \(task\.group\) 'h'"):
        task_of(group="h").check(rows_of({"a": "x", "b": "", "t": "y", "g": 3}))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"aa": "x", "b": "", "t": "y"}, "data.jsonl: no column (task.prompt) 'a'. Did you mean 'aa'?"),
        ({"a": "x", "bb": "", "t": "y"}, "data.jsonl: no column (task.prompt) 'b'. Did you mean 'bb'?"),
        ({"a": "x", "b": "", "tt": "y"}, "data.jsonl: no column (task.target) 't'. Did you mean 'tt'?"),
        ({"a": "x", "b": "", "t": []}, "data.jsonl:1: column 't' holds no text"),
        ({"a": "x", "b": "", "t": ["y", 3]}, "data.jsonl:1: column 't' holds int, not text"),
        ({"a": "x", "b": "", "t": None}, "data.jsonl:1: column 't' holds null, not text"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(row: dict, says: str) -> None:
    with pytest.raises(DataError) as caught:
        task_of().check(rows_of(row))
    assert str(caught.value).startswith(says)


def test_for_an_answer_a_row_needs_neither_target_nor_optional_cells() -> None:
    task = task_of()
    ((query,), num_cut) = task.encode_queries(rows_of(task.row_of("x")), reader_like("gpt2"))
    assert (query.text, num_cut) == ("Say x:", 0)


def test_room_for_the_longer_of_target_and_answer_is_kept() -> None:
    task = task_of(max_length=99, max_target_length=10, decode=DecodeSpec(max_new_tokens=20))
    reader = reader_like("gpt2", max_length=50)
    encoded = task.encode(rows_of({"a": "x" * 99, "b": "", "t": "y" * 99}), reader)
    assert len(encoded.queries[0].input_ids) == 30
    with pytest.raises(ConfigError, match=r"task\.decode\.max_new_tokens=20: at most"):
        task.encode(rows_of({"a": "x", "b": "", "t": "y"}), reader_like("gpt2", max_length=21))


def examples_of(*, decoder_start: int | None) -> list[TextExample]:
    if decoder_start is not None:
        return [
            TextExample(0, [5, 6, 7, 2], [8, 9, 10, 2], decoder_start),
            TextExample(1, [11, 2], [12, 2], decoder_start),
        ]
    return [
        TextExample(0, [1, 5, 0, 7, 8, 2, 9, 2], [IGNORED] * 4 + [8, 2, 9, 2]),
        TextExample(1, [1, 15, 16, 2], [IGNORED, 15, 16, 2]),
        TextExample(2, [25, 2], [IGNORED, 2]),
    ]


FAMILIES = ("gpt2", "llama", "t5", "bart")


def start_of(family: str) -> int | None:
    return 0 if family in ("t5", "bart") else None


def loss_by_hand(model: torch.nn.Module, example: TextExample, smoothing: float) -> float:
    """One example, alone, token by token."""
    inputs = {"input_ids": torch.tensor([example.input_ids])}
    targets = example.labels[1:]
    if example.decoder_start is not None:
        inputs["decoder_input_ids"] = torch.tensor([[example.decoder_start, *example.labels[:-1]]])
        targets = example.labels
    log_p = model(**inputs).logits[0].log_softmax(-1)
    total = 0.0
    for row, target in zip(log_p, targets, strict=False):
        if target != IGNORED:
            total -= (1 - smoothing) * row[target].item() + smoothing * row.mean().item()
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_sum_over_the_answers_tokens(family: str, smoothing: float) -> None:
    model, task = tiny_lm(family), task_of(label_smoothing=smoothing)
    examples = examples_of(decoder_start=start_of(family))
    batch = task.collate(examples)
    with torch.no_grad():
        found = task.loss(forward(model, batch), batch).item()
        expected = sum(loss_by_hand(model, example, smoothing) for example in examples)
        scorer = task.scorer()
        scorer.add(forward(model, batch), batch, [0])
    assert found == pytest.approx(expected, rel=1e-5)
    plain = sum(loss_by_hand(model, example, 0.0) for example in examples) / task.num_targets(batch)
    assert scorer.result() == {
        "loss": pytest.approx(plain, rel=1e-5),
        "perplexity": pytest.approx(math.exp(plain), rel=1e-5),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_loss_is_that_of_transformers(family: str) -> None:
    model, task = tiny_lm(family), task_of()
    batch = task.collate(examples_of(decoder_start=start_of(family)))
    with torch.no_grad():
        mean = task.loss(forward(model, batch), batch) / task.num_targets(batch)
        expected = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    assert mean.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_logits_are_summed_in_float32(family: str) -> None:
    task = task_of()
    batch = task.collate(examples_of(decoder_start=start_of(family)))
    logits = torch.randn(*batch["labels"].shape, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = task.loss(logits, batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(task.loss(logits.float(), batch).item(), rel=1e-6)


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "gpt_neox", "phi", "phi3", "qwen2", "qwen3", "gemma", "gemma3_text", "mistral", "opt"]
)
def test_texts_laid_end_to_end_have_the_loss_and_gradients_of_padded_ones(family: str) -> None:
    model, task = tiny_lm(family).double(), task_of()
    model.config.use_cache, model.config.pad_token_id = False, None
    batch = task.collate(examples_of(decoder_start=None))
    losses, gradients = [], []
    for is_packed in (False, True):
        assert not is_packed or remove_padding(model)
        model.zero_grad()
        loss = task.loss(forward(model, batch), batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6)


def test_a_task_is_built_by_its_kind() -> None:
    task = build_task(GenerationSpec(name="t"))
    assert isinstance(task, Generation)
    assert (task.primary_metric, task.generates, task.labels) == ("loss", True, None)
    task.fit_labels(Rows([], source=""))
    assert task.all_columns == ("prompt", "target")
    assert "{prompt} → {target}" in task.describe()


def test_structured_data_is_read_by_its_own_column() -> None:
    task = task_of(format="dart", prompt="{input}{eos}", target=" {target}")
    row = {"tripleset": [["A", "IN", "B"]], "annotations": {"text": ["a is in b"], "source": ["x"]}}
    encoded = task.encode(rows_of(row), reader_like("gpt2"))
    assert (task.columns, task.all_columns) == (("tripleset",), ("tripleset", "annotations"))
    assert encoded.queries[0].text == "A : in : B"
    assert encoded.queries[0].input_ids[-1] == reader_like("gpt2").eos
    ((query,), _) = task.encode_queries(rows_of(task.row_of("A : in : B")), reader_like("gpt2"))
    assert query.input_ids == encoded.queries[0].input_ids
