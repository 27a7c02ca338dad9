"""Plain text: every token but the first is predicted once."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.engine.device import open_device
from lora_cli.engine.evaluate import evaluate
from lora_cli.errors import ConfigError, DataError
from lora_cli.spec import DecodeSpec, DeviceSpec, LanguageModelingSpec
from lora_cli.tasks.language_modeling import LanguageModeling
from lora_cli.tasks.sequences import IGNORED, TextExample
from nn.models import tiny_lm
from tasks.readers import DECODERS, Reader, reader_like, rows_of


def task_of(**values: object) -> LanguageModeling:
    return LanguageModeling(LanguageModelingSpec(name="t", **values))


@pytest.fixture(scope="module", params=DECODERS)
def reader(request: pytest.FixtureRequest) -> Reader:
    return reader_like(request.param)


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.sampled_from("the in x{}<>é\n"), max_size=60), most=st.integers(4, 20))
def test_every_token_but_the_first_is_predicted_once(reader: Reader, text: str, most: int) -> None:
    (whole,) = task_of(max_length=10_000).encode(rows_of({"text": text}), reader).examples
    pieces = task_of(max_length=most).encode(rows_of({"text": text}), reader).examples
    assert whole.input_ids[-1] == reader.eos
    assert whole.labels == [IGNORED, *whole.input_ids[1:]]
    assert [label for piece in pieces for label in piece.labels if label != IGNORED] == whole.input_ids[1:]
    assert all(len(piece.input_ids) <= most for piece in pieces)
    assert all(piece.labels == [IGNORED, *piece.input_ids[1:]] for piece in pieces)
    # Each piece goes on from the token that ended the one before.
    assert all(a.input_ids[-1] == b.input_ids[0] for a, b in pairwise(pieces))
    assert [piece.index for piece in pieces] == list(range(len(pieces)))


def test_the_models_positions_are_a_limit_too() -> None:
    found = task_of(max_length=100).encode(rows_of({"text": "x" * 40}), reader_like("gpt2", max_length=16))
    assert [len(piece.input_ids) for piece in found.examples] == [16, 16, 11]
    assert (found.num_tokens, found.num_truncated, found.queries) == (43, 0, [])


def test_perplexity_is_that_of_the_whole_text() -> None:
    model, task = tiny_lm("gpt2"), task_of()
    tokens = torch.randint(1, 40, (1, 20), generator=torch.Generator().manual_seed(3))
    texts = [tokens[0, :12].tolist(), tokens[0, 12:].tolist()]
    examples = [TextExample(index, ids, [IGNORED, *ids[1:]]) for index, ids in enumerate(texts)]
    found = evaluate(model, task, examples, device=open_device(DeviceSpec(name="cpu")), batch_size=2).result()
    nll = 0.0
    with torch.no_grad():
        for ids in texts:
            for place in range(1, len(ids)):
                nll -= model(torch.tensor([ids[:place]])).logits[0, -1].log_softmax(-1)[ids[place]].item()
    assert found["perplexity"] == pytest.approx(math.exp(nll / 18), rel=1e-5)
    assert found["loss"] == pytest.approx(nll / 18, rel=1e-5)


def test_a_text_that_is_a_single_token_has_nothing_to_predict() -> None:
    task = task_of()
    (example,) = (found := task.encode(rows_of({"text": ""}), reader_like("gpt2"))).examples
    assert (example.labels, found.num_empty) == ([IGNORED], 1)
    batch = task.collate([example])
    loss = task.loss(torch.zeros(1, 1, 5, requires_grad=True), batch)
    loss.backward()
    assert (loss.item(), task.num_targets(batch)) == (0.0, 0)


def test_a_column_may_be_called_anything() -> None:
    for column in ("eos", "a}b", "text"):
        (example,) = task_of(text=column).encode(rows_of({column: "{eos}"}), reader_like("gpt2")).examples
        assert reader_like("gpt2").tokenizer.decode(example.input_ids) == "{eos}<|endoftext|>"


def test_a_text_is_continued_not_ended() -> None:
    task, reader = task_of(decode=DecodeSpec(max_new_tokens=8)), reader_like("llama", max_length=20)
    queries, num_cut = task.encode_queries(rows_of(task.row_of("xy"), {"text": "x" * 30}), reader)
    assert queries[0].input_ids == reader.tokenizer("xy")["input_ids"]
    assert (queries[0].text, queries[1].num_tokens, num_cut) == ("xy", 12, 1)


def test_what_cannot_be_used_is_refused() -> None:
    with pytest.raises(ConfigError, match="plain text needs a decoder"):
        task_of().encode(rows_of({"text": "x"}), reader_like("t5"))
    with pytest.raises(DataError, match=r"data\.jsonl:1: no column \(task\.text\) 'text'. Did you mean 'txt'"):
        task_of().check(rows_of({"txt": "x"}))
    with pytest.raises(DataError, match=r"data\.jsonl:2: column 'text' holds int"):
        task_of().check(rows_of({"text": "x"}, {"text": 1}))
    assert task_of().describe() == "text → each next token"
    assert not task_of().generates
