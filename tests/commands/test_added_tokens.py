"""model.add_tokens: from the command line into the tokenizer, the model, the run's files, and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from commands.conftest import FILMS, MODEL, write_csv
from lora_cli.models import load_base
from lora_cli.options import conf_dir
from lora_cli.spec import ModelSpec
from lora_cli.tokenizer import load_tokenizer

TOKENS = 'model.add_tokens=["<data>","</data>"]'
WRITES = (
    "task=text_generation",
    "task.metrics=[rougeL,perplexity]",
    "task.decode.max_new_tokens=4",
    "task.data.train=answers.csv",
    "task.data.validation=more.csv",
)
READS = ("task=text_classification", "task.label=verdict", *FILMS)
LOOP = ("train.max_steps=4", "train.batch_size=8", "train.lr=1e-2", "device.threads=1", "hydra.run.dir=run")


@pytest.fixture
def data(films: Path) -> Path:
    rows = [{"prompt": f"<data> {n} </data>", "target": "<data>" + "ab" * (n % 5 + 1)} for n in range(48)]
    write_csv(films / "answers.csv", rows[:40])
    write_csv(films / "more.csv", rows[40:])
    return films


def train(call, *words: str) -> Path:
    answer = call("train", *LOOP, TOKENS, *words)
    assert answer.code == 0, answer.err
    if "lora=full" not in words:
        assert "new tokens" in answer.err
    return Path("run")


def evaluate(call, *words: str) -> dict[str, float]:
    answer = call("eval", *words, "output=scored")
    assert answer.code == 0, answer.err
    found = json.loads(Path("scored/metrics.json").read_text())["metrics"]
    shutil.rmtree("scored")
    return found


@pytest.mark.parametrize(
    ("lora", "model"),
    [("lora", "tiny-gpt2"), ("lora", "tiny-llama"), ("lora", "tiny-t5"), ("full", "tiny-gpt2")],
)
def test_a_run_and_its_adapter_alone_give_the_figures_of_the_training(lora, model, data, call) -> None:
    run = train(call, f"lora={lora}", f"model={model}", *WRITES)
    expected = json.loads((run / "run.json").read_text())["metrics"]["validation"]
    assert evaluate(call, "run=run") == expected
    assert json.loads((run / "adapter/lora.json").read_text())["extra"]["tokens"] == ["<data>", "</data>"]
    alone = ("run=run/adapter", f"model={model}", *WRITES)
    assert evaluate(call, *alone) == pytest.approx(expected)
    answer = call("eval", *alone, 'model.add_tokens=["<other>"]')
    assert answer.code == 2
    assert "was trained with model.add_tokens=" in answer.err


def test_a_token_in_a_text_is_one_token_whose_row_learns(data, call) -> None:
    rows = load_file(train(call, "model=tiny-llama", *WRITES) / "adapter/adapter_model.safetensors")
    start = load_base(ModelSpec(**TINY_LLAMA, add_tokens=["<data>", "</data>"]), **HEAD)
    for name in ("model.embed_tokens", "lm_head"):
        before = start.model.get_submodule(name).weight[list(start.new_rows)]
        after = rows[f"base_model.model.{name}.token_adapter.trainable_tokens_delta"]
        assert ((after - before).abs().mean(1) > 1e-3).all()


def test_a_classifier_reads_them(data, call) -> None:
    run = train(call, *MODEL, *READS)
    assert evaluate(call, "run=run") == json.loads((run / "run.json").read_text())["metrics"]["validation"]


def test_the_tokenizer_of_the_run_knows_each_by_one_number(data, call) -> None:
    tokenizer = load_tokenizer(train(call, "model=tiny-gpt2", *WRITES) / "tokenizer")
    numbers = tokenizer("a<data>b</data>", add_special_tokens=False)["input_ids"]
    assert len(numbers) == 4
    assert tokenizer.decode(numbers, skip_special_tokens=True) == "a<data>b</data>"


def test_a_resumed_training_ends_in_the_same_bits(data, call) -> None:
    words = ("model=tiny-llama", *WRITES, "train.save_every=2", "train.keep=9")
    run = train(call, *words)
    expected = (run / "adapter/adapter_model.safetensors").read_bytes()
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"status": "running"}))
    (run / "checkpoints/step-000004/manifest.json").unlink()
    answer = call("train", *LOOP, TOKENS, *words, "resume=auto")
    assert answer.code == 0, answer.err
    assert "from step 2" in answer.err
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == expected


def test_tokens_that_no_text_holds_are_no_fault(films, call) -> None:
    for name in ("answers", "more"):
        write_csv(films / f"{name}.csv", [{"prompt": f"{name} {n}", "target": "ab"} for n in range(40)])
    train(call, "model=tiny-llama", *WRITES)


TINY_LLAMA = yaml.safe_load((conf_dir() / "model/tiny-llama.yaml").read_text())
HEAD = {"num_outputs": 0, "labels": None, "problem": "generation", "seed": 0}
GPT2 = {"name": "x", "family": "gpt2", "random": {"n_embd": 16, "n_layer": 1, "n_head": 2}}


def test_the_base_is_known_by_its_own_weights_alone() -> None:
    plain = load_base(ModelSpec(**GPT2), **HEAD)
    more = load_base(ModelSpec(**GPT2, add_tokens=["<a>", "<b>"]), **HEAD)
    assert more.fingerprint == plain.fingerprint
    assert more.new_rows == (len(plain.tokenizer), len(plain.tokenizer) + 1)
    assert len(more.tokenizer) == len(plain.tokenizer) + 2
    rows = more.model.get_input_embeddings().weight
    assert rows.shape[0] == plain.model.get_input_embeddings().weight.shape[0] + 2
    assert more.model.get_output_embeddings().weight is rows


def test_rows_that_a_checkpoint_has_to_spare_are_used() -> None:
    settings = {**GPT2, "random": {**GPT2["random"], "vocab_size": 300}}
    plain = load_base(ModelSpec(**settings), **HEAD)
    more = load_base(ModelSpec(**settings, add_tokens=["<a>"]), **HEAD)
    assert more.fingerprint == plain.fingerprint
    assert more.model.get_input_embeddings().weight.shape[0] == 300
    assert more.new_rows == (len(plain.tokenizer),)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("[a]", "model.add_tokens=a: the tokenizer knows it already, as number"),
        ('["[PAD]"]', "the tokenizer knows it already"),
        ('["<a>","<a>"]', "each token once"),
        ("[' ']", "texts that are not blank"),
    ],
)
def test_tokens_that_cannot_be_added_are_refused(value, says, data, refused) -> None:
    assert says in refused("train", "model=tiny-gpt2", *WRITES, f"model.add_tokens={value}")
