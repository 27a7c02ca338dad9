"""A compiled forward pass: the losses of the plain one, few graphs, and a training that goes on without a compiler.

Graphs are traced for real and run by a backend that makes no kernels of them; the one that does is tested slowly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands.conftest import FILMS, read_jsonl, write_films
from lora_cli import compiled

WRITER = ("model=tiny-gpt2", "task=text_generation", *FILMS, "task.prompt={text}: ", "task.target={verdict}")
WRITER += ("task.metrics=[perplexity]",)
CLASSIFIER = ("model=tiny-bert", "task=text_classification", *FILMS, "task.text=[text]", "task.label=verdict")
SHORT = (
    "train.epochs=2",
    "train.batch_size=8",
    "task.data.train_limit=20",
    "task.max_length=32",
    "train.log_every=1",
    "lora.dropout=0",
    "model.dropout=0",
)
SHORT += ("device.threads=1",)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The graphs that are handed to the backend."""
    import torch

    seen: list[object] = []

    def backend(graph, examples):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", backend)
    torch._dynamo.reset()
    yield seen
    torch._dynamo.reset()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_films(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(call, home: Path, name: str, *words: str) -> list[dict[str, float]]:
    answer = call("train", *words, *SHORT, f"hydra.run.dir={name}")
    assert answer.code == 0, answer.err
    return read_jsonl(home / name / "metrics.jsonl")


@pytest.mark.parametrize(
    "words",
    [CLASSIFIER, WRITER, pytest.param((*WRITER, "model=tiny-t5"), marks=pytest.mark.slow)],
    ids=["classifier", "decoder", "encoder-decoder"],
)
def test_a_compiled_training_has_the_losses_of_the_plain_one_and_an_adapter_like_any(words, home, call, graphs) -> None:
    plain = trained(call, home, "plain", *words)
    assert not graphs
    ours = trained(call, home, "compiled", *words, "device.compile=true")
    number = len(graphs)
    assert number
    for one, other in zip(plain, ours, strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-6)
    metric = "accuracy" if words is CLASSIFIER else "perplexity"
    recorded = json.loads((home / "compiled/run.json").read_text())["metrics"]["validation"]
    answer = call("eval", "run=compiled", "task.split=validation", "device=cpu", "device.threads=1")
    assert answer.code == 0, answer.err
    found = json.loads((home / "compiled/eval/validation/metrics.json").read_text())["metrics"]
    assert found[metric] == pytest.approx(recorded[metric], rel=1e-5)
    assert len(graphs) == number, "only trainings compile"


def test_lengths_and_rows_of_batches_take_few_graphs_and_other_weights_none(graphs) -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from lora_cli.nn import adapted_layers, inject
    from lora_cli.spec import LoraSpec

    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50)
    model = BertForSequenceClassification(config).eval()
    inject(model, LoraSpec(targets=["query", "value"], r=2), groups={})
    form = compiled.Compiled(model, pad=0, longest=48)

    def both(rows: int, length: int) -> None:
        ids = torch.randint(1, 50, (rows, length))
        mask = torch.ones_like(ids)
        mask[-1, length // 2 :] = 0
        inputs = {"input_ids": ids * mask, "attention_mask": mask}
        with torch.inference_mode():
            torch.testing.assert_close(form(inputs), model(**inputs).logits, rtol=1e-5, atol=1e-6)

    # 16, 32 and the longest: 48.
    for rows, length in ((4, 3), (4, 16), (2, 9), (4, 17), (1, 30), (4, 32), (3, 33), (4, 48)):
        both(rows, length)
    assert len(graphs) == 3
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.B.normal_()
    both(4, 20)
    assert len(graphs) == 3


def test_without_a_compiler_a_training_goes_on_uncompiled_and_says_so_once(home, call, graphs, monkeypatch) -> None:
    monkeypatch.setattr("lora_cli.engine.device.compiler", lambda: None)
    plain = trained(call, home, "plain", *CLASSIFIER)
    with pytest.warns(UserWarning, match="goes on uncompiled, there is no C") as said:
        ours = trained(call, home, "compiled", *CLASSIFIER, "device.compile=true")
    assert ours == plain
    assert len(said) == 1
    assert not graphs


def test_where_compiling_fails_a_training_goes_on_uncompiled_and_says_so_once(home, call, monkeypatch) -> None:
    def backend(graph, examples):
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(compiled, "BACKEND", backend)
    plain = trained(call, home, "plain", *CLASSIFIER, "train.packing=false")
    with pytest.warns(UserWarning, match="goes on uncompiled, torch.compile failed.*no kernel for this") as said:
        ours = trained(call, home, "compiled", *CLASSIFIER, "device.compile=true")
    assert ours == plain
    assert len(said) == 1


@pytest.mark.parametrize(
    "words",
    [
        *("train.cache=memory", "train.checkpointing=true", "train.packing=true", "train.logits_chunk=5"),
        *("lora=dylora", "model.quantization=nf4", "device.shard=true", "train.batch_size=auto train.global_batch=8"),
    ],
)
def test_what_a_graph_of_fixed_shapes_cannot_hold_is_refused(words, call) -> None:
    answer = call("train", "task=support_intents", "model=tiny-bert", "device.compile=true", *words.split())
    assert answer.code == 2
    assert "not with device.compile=true" in answer.err
    assert len(answer.err.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("device=ddp", "device.nproc=2")], ids=["one", "two"])
def test_kernels_that_are_compiled_compute_the_same(more, home, forked) -> None:
    runs = []
    for name in ("plain", "compiled"):
        words = (*CLASSIFIER, *SHORT, *more, f"device.compile={name == 'compiled'}", f"hydra.run.dir={name}")
        process = forked("train", *words, cwd=home)
        assert process.returncode == 0, process.stderr
        assert not {"uncompiled", "leaked"} & set(process.stderr.split())
        runs.append(read_jsonl(home / name / "metrics.jsonl"))
    for one, other in zip(*runs, strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-6)
