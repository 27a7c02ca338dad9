"""From rows to batches, losses, scores and answers, with a tokenizer of a dozen words."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_cli.errors import ConfigError, DataError, ModelError, UnknownName
from lora_cli.spec import ClassificationSpec, TaskSpec
from lora_cli.tasks import build_task, encoding
from lora_cli.tasks.classification import Classification
from lora_cli.tasks.rows import Rows
from tasks.readers import Reader

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e"]
PAD, UNK, CLS, SEP, A, B, C, D, E = range(9)


BERT_INPUTS = ["input_ids", "token_type_ids", "attention_mask"]


def build_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", **{"model_input_names": BERT_INPUTS, **settings}
    )


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(build_tokenizer(model_max_length=32))


def task_of(**values: Any) -> Classification:
    return Classification(ClassificationSpec(name="t", **{"labels": ["no", "yes"], **values}))


def rows_of(*rows: dict[str, Any]) -> Rows:
    return Rows(list(rows), source="data.csv", separator=":")


def texts(*values: Any, label: Any = "yes") -> Rows:
    return rows_of(*({"text": value, "label": label} for value in values))


def test_a_text_becomes_tokens_and_a_label(reader) -> None:
    encoded = task_of().encode(texts("a b", "c"), reader)
    assert [example.input_ids for example in encoded.examples] == [([CLS, A, B, SEP],), ([CLS, C, SEP],)]
    assert [(example.index, example.label, example.num_tokens) for example in encoded.examples] == [
        (0, 1, 4),
        (1, 1, 3),
    ]
    assert (encoded.num_tokens, encoded.num_truncated, encoded.num_empty) == (7, 0, 0)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_many_texts_are_tokenized_in_parts(reader, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    rows = texts("a b", "c", "", "d e " * 20, "e")
    pairs = rows_of(*({"text": "a", "x": letter, "y": "d " * 40, "label": "yes"} for letter in "abcde"))
    settings = {"choices": ["x", "y"], "labels": ["yes", "no"]}
    wanted = task_of().encode(rows, reader), task_of(**settings).encode(pairs, reader)
    monkeypatch.setattr(encoding, "AT_ONCE", at_once)
    assert (task_of().encode(rows, reader), task_of(**settings).encode(pairs, reader)) == wanted


def test_a_pair_has_two_segments(reader) -> None:
    task = task_of(text=["p", "q"])
    (example,) = task.encode(rows_of({"p": "a", "q": "b c", "label": 0}), reader).examples
    assert example.input_ids == ([CLS, A, SEP, B, C, SEP],)
    assert example.token_type_ids == ([0, 0, 0, 1, 1, 1],)


def test_tokens_have_no_segment_if_the_tokenizer_gives_none() -> None:
    plain = Reader(build_tokenizer(model_input_names=["input_ids", "attention_mask"]))
    task = task_of()
    examples = task.encode(texts("a"), plain).examples
    assert examples[0].token_type_ids is None
    assert "token_type_ids" not in task.collate(examples)


def test_a_template_reads_several_columns_and_is_no_program(reader) -> None:
    task = task_of(text=["{word} {s1}", "s2"])
    assert task.columns == ("word", "s1", "s2")
    row = {"word": "a", "s1": "{s2} b", "s2": "c", "label": 1}
    (example,) = task.encode(rows_of(row), reader).examples
    assert example.input_ids == ([CLS, A, UNK, UNK, UNK, B, SEP, C, SEP],)
    with pytest.raises(DataError, match=r"'word.__class__'"):
        task_of(text=["{word.__class__}"]).encode(rows_of(row), reader)


def test_each_candidate_answer_is_a_sequence_of_its_own(reader) -> None:
    task = task_of(text=["p", "question"], choices=["x", "y"], labels=None)
    encoded = task.encode(rows_of({"p": "a", "question": "b", "x": "c", "y": "d e", "label": 1}), reader)
    (example,) = encoded.examples
    assert example.input_ids == ([CLS, A, B, SEP, C, SEP], [CLS, A, B, SEP, D, E, SEP])
    assert (task.num_outputs, task.labels, example.label, example.num_tokens) == (1, ("x", "y"), 1, 7)
    assert task.collate([example, example])["input_ids"].shape == (4, 7)


@pytest.mark.parametrize(("max_length", "model_max_length", "kept"), [(5, 32, 5), (128, 6, 6), (128, int(1e30), 22)])
def test_no_text_is_longer_than_task_and_model_allow(max_length: int, model_max_length: int, kept: int) -> None:
    reader = Reader(build_tokenizer(model_max_length=model_max_length))
    encoded = task_of(max_length=max_length).encode(texts("a " * 20, "a"), reader)
    assert [example.num_tokens for example in encoded.examples] == [kept, 3]
    assert encoded.num_truncated == int(kept < 22)


def test_the_longest_text_of_a_pair_is_cut_first(reader) -> None:
    task = task_of(text=["p", "q"], max_length=8)
    (example,) = task.encode(rows_of({"p": "a b", "q": "c " * 9, "label": 1}), reader).examples
    assert example.input_ids == ([CLS, A, B, SEP, C, C, C, SEP],)


def test_huge_texts_are_cut_soon_and_counted(reader) -> None:
    start = time.perf_counter()
    task = task_of(text=["p", "q"])
    encoded = task.encode(rows_of({"p": "a " * 5_000_000, "q": "b" * 10_000_000, "label": 1}), reader)
    assert encoded.num_truncated == 1
    assert encoded.num_tokens == 32
    assert time.perf_counter() - start < 5


def test_empty_texts_are_accepted_and_counted(reader) -> None:
    encoded = task_of().encode(texts("", " \t", "a"), reader)
    assert encoded.num_empty == 2
    assert encoded.examples[0].input_ids == ([CLS, SEP],)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=[])), min_size=1, max_size=4))
def test_any_text_json_can_hold_is_encoded(reader, values) -> None:
    encoded = task_of().encode(texts(*values, "\ud800 a \x1b[31m"), reader)
    assert len(encoded.examples) == len(values) + 1


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (rows_of({"txt": "a", "label": 1}), "data.csv: no column (task.text) 'text'. Did you mean 'txt'?"),
        (rows_of({"text": "a", "label": 1}, {"label": 1}), "data.csv:2: no column (task.text) 'text'"),
        (texts("a", None), "data.csv:2: column 'text' holds null, not text"),
        (texts(7), "holds int, not text"),
        (texts(["a"]), "holds list, not text"),
        (rows_of({"text": "a", "gold": 1}), "no column (task.label) 'label'"),
        (texts("a", label="maybe"), "data.csv:1: no label 'maybe'. There are: no, yes"),
        (texts("a", label=None), "is null"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_named(reader, rows: Rows, says: str) -> None:
    with pytest.raises(DataError) as caught:
        task_of().encode(rows, reader)
    assert says in str(caught.value)
    assert len(str(caught.value)) <= 300


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast, pad_token_id = False, 0

    with pytest.raises(ModelError, match="fast"):
        task_of().encode(texts("a"), Reader(Slow()))


def test_texts_without_label_are_encoded_the_same_way(reader) -> None:
    task = task_of()
    (example,) = task.encode_texts(rows_of({"text": "a b"}), reader).examples
    assert example.input_ids == task.encode(texts("a b"), reader).examples[0].input_ids
    assert "labels" not in task.collate([example])
    with pytest.raises(DataError, match=r"data\.csv:1"):
        task.encode_texts(rows_of({"text": None}), reader)


def test_labels_are_taken_from_the_training_rows_unless_known() -> None:
    task = task_of(labels=None)
    task.fit_labels(rows_of({"label": "b"}, {"label": "a"}, {"label": "c"}))
    assert (task.labels, task.num_outputs) == (("a", "b", "c"), 3)
    known = Classification(ClassificationSpec(name="t", labels=["x", "y"]), labels=("b", "a"))
    known.fit_labels(rows_of({"label": "a"}, {"label": "b"}))
    assert known.labels == ("b", "a")


def test_one_class_is_nothing_to_learn() -> None:
    with pytest.raises(DataError, match="all 2 training rows have the label 'a'"):
        task_of(labels=None).fit_labels(rows_of({"label": "a"}, {"label": "a"}))


def test_regression_has_no_labels() -> None:
    task = task_of(labels=None, regression=True, metrics=["pearson"])
    task.fit_labels(rows_of({"label": 1.0}))
    assert (task.labels, task.num_outputs, task.primary_metric) == (None, 1, "pearson")


def test_f1_and_choices_need_fitting_numbers_of_labels() -> None:
    with pytest.raises(ConfigError, match="use macro_f1"):
        task_of(labels=["a", "b", "c"], metrics=["f1"])
    late = task_of(labels=None, metrics=["accuracy", "f1"])
    with pytest.raises(ConfigError, match="use macro_f1"):
        late.fit_labels(rows_of(*({"label": label} for label in "abc")))
    with pytest.raises(ConfigError, match=r"task\.choices"):
        task_of(choices=["x", "y", "z"])


def test_a_batch_is_padded_to_its_longest() -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = "e"
    task = task_of()
    batch = task.collate(task.encode(texts("a b", "c"), Reader(tokenizer)).examples)
    assert batch["input_ids"].tolist() == [[CLS, A, B, SEP], [CLS, C, SEP, E]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["token_type_ids"].tolist() == [[0] * 4, [0] * 4]
    assert batch["labels"].tolist() == [1, 1]
    assert task.num_targets(batch) == 2


LOGITS = torch.tensor([[2.0, -1.0], [0.5, 0.25], [-3.0, 1.0]])


def cross_entropy(rows: list[list[float]], labels: list[int]) -> float:
    return sum(math.log(sum(map(math.exp, row))) - row[label] for row, label in zip(rows, labels, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_a_sum_in_float32(dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)
    loss = task_of().loss(logits, {"labels": torch.tensor([0, 1, 1])})
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(cross_entropy(logits.double().tolist(), [0, 1, 1]), rel=1e-6)


def test_candidates_compete_within_their_row() -> None:
    task = task_of(choices=["x", "y"], labels=None)
    loss = task.loss(LOGITS.reshape(6, 1), {"labels": torch.tensor([0, 1, 1])})
    assert loss.item() == pytest.approx(cross_entropy(LOGITS.tolist(), [0, 1, 1]), rel=1e-6)
    assert [row["label"] for row in task.decode(LOGITS.reshape(6, 1))] == ["x", "x", "y"]


@pytest.fixture
def regression() -> Classification:
    return task_of(labels=None, regression=True, metrics=["pearson", "spearman"])


def test_regression_has_squared_error(regression: Classification) -> None:
    loss = regression.loss(torch.tensor([[1.0], [2.5]]), {"labels": torch.tensor([0.0, 2.0])})
    assert loss.item() == pytest.approx(1.25)


def test_a_scorer_keeps_decisions_in_the_splits_order() -> None:
    task = task_of(metrics=["accuracy", "f1"])
    scorer = task.scorer()
    scorer.add(LOGITS[2:], {"labels": torch.tensor([1])}, [2])
    scorer.add(LOGITS[:2], {"labels": torch.tensor([0, 1])}, [1, 0])
    assert scorer.result() == {
        "loss": pytest.approx(cross_entropy(LOGITS.tolist(), [0, 1, 1]) / 3, rel=1e-6),
        "accuracy": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
    }
    assert scorer.undefined == {}
    assert scorer.confusion == [[1, 0], [1, 1]]
    assert [(row["index"], row["label"], row["prediction"]) for row in scorer.predictions] == [
        (0, "yes", "no"), (1, "no", "no"), (2, "yes", "yes"),
    ]  # fmt: skip
    assert scorer.predictions[2]["probability"] == pytest.approx(1 / (1 + math.exp(-4)), rel=1e-5)


def test_a_scorer_says_why_a_metric_is_missing(regression: Classification) -> None:
    scorer = regression.scorer()
    scorer.add(torch.tensor([[0.5], [0.5]]), {"labels": torch.tensor([1.0, 2.0])}, [0, 1])
    assert scorer.result() == {"loss": pytest.approx(1.25), "pearson": None, "spearman": None}
    assert set(scorer.undefined) == {"pearson", "spearman"}
    assert scorer.confusion is None
    assert scorer.predictions[1] == {"index": 1, "label": 2.0, "prediction": 0.5}


def test_answers_carry_names_and_probabilities(regression: Classification) -> None:
    answer = task_of().decode(LOGITS)[0]
    assert answer["label"] == "no"
    assert answer["probabilities"] == pytest.approx({"no": 1 / (1 + math.exp(-3)), "yes": 1 / (1 + math.exp(3))})
    assert regression.decode(torch.tensor([[0.25]])) == [{"value": 0.25}]


def test_a_task_is_built_by_its_kind() -> None:
    assert build_task(ClassificationSpec(name="t"), labels=["a", "b"]).labels == ("a", "b")
    with pytest.raises(UnknownName, match="Did you mean classification"):
        build_task(TaskSpec(kind="clasification", name="t"))
