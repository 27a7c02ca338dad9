"""lora=full: every weight trains, by the commands and into the files of any other run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from commands.conftest import FILMS, MODEL, read_jsonl, write_csv
from lora_cli.config import launch
from lora_cli.engine.batches import BatchPlan
from lora_cli.engine.optim import rate
from lora_cli.models import load_base
from lora_cli.tasks import build_task, load_splits

READS = (*MODEL, "task=text_classification", "task.label=verdict", "task.metrics=[accuracy,macro_f1]", *FILMS)
WRITES = (
    "model=tiny-gpt2",
    "task=text_generation",
    "task.metrics=[rougeL,perplexity]",
    "task.decode.max_new_tokens=4",
    "task.data.train=answers.csv",
    "task.data.validation=answers.csv",
)
KINDS = pytest.mark.parametrize("words", [READS, WRITES], ids=["classification", "generation"])
LOOP = ("train.max_steps=6", "train.batch_size=8", "train.log_every=1", "device.threads=1")


@pytest.fixture
def data(films: Path) -> Path:
    write_csv(films / "answers.csv", [{"prompt": f"say {n}", "target": "ab" * (n % 5 + 1)} for n in range(40)])
    return films


def train(call, *words: str) -> Path:
    answer = call("train", "lora=full", *LOOP, *words, "hydra.run.dir=run")
    assert answer.code == 0, answer.err
    return Path("run")


@KINDS
def test_evaluation_of_the_saved_run_gives_its_figures(words, data, call) -> None:
    run = train(call, *words)
    facts = json.loads((run / "run.json").read_text())
    assert facts["parameters"]["trainable"] == facts["parameters"]["total"]
    assert facts["targets"][0]["pattern"] == "everything"
    assert sorted(path.name for path in (run / "adapter").iterdir()) == [
        "README.md",
        "config.json",
        "lora.json",
        "model.safetensors",
    ]
    assert "The whole model, fine-tuned" in (run / "adapter/README.md").read_text()
    assert call("eval", "run=run").code == 0
    assert json.loads((run / "eval/validation/metrics.json").read_text())["metrics"] == facts["metrics"]["validation"]


def test_the_folder_alone_can_be_evaluated(data, call) -> None:
    run = train(call, *READS)
    words = ("run=run/adapter", *READS, "batch_size=64", "output=alone")
    answer = call("eval", *words)
    assert answer.code == 0, answer.err
    found = json.loads(Path("alone/metrics.json").read_text())["metrics"]
    assert found == pytest.approx(json.loads((run / "run.json").read_text())["metrics"]["validation"])


@KINDS
def test_a_resumed_training_ends_in_the_same_bits(words, data, call) -> None:
    words = (*words, "model.dropout=0.1", "train.save_every=2", "train.keep=9")
    run = train(call, *words)
    expected = {name: (run / name).read_bytes() for name in ("adapter/model.safetensors", "metrics.jsonl")}
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"status": "running"}))
    for newest in ("step-000006", "step-000004"):
        (run / "checkpoints" / newest / "manifest.json").unlink()
    answer = call("train", "lora=full", *LOOP, *words, "hydra.run.dir=run", "resume=auto")
    assert answer.code == 0, answer.err
    assert "from step 2" in answer.err
    assert {name: (run / name).read_bytes() for name in expected} == expected


def test_losses_are_those_of_a_plain_loop_over_all_parameters(data, call) -> None:
    words = (*WRITES, "model.dropout=0.0")
    run = train(call, *words)
    ours = [row["train/loss"] for row in read_jsonl(run / "metrics.jsonl") if "train/loss" in row]
    specs = []
    launch("train", ["lora=full", *LOOP, *words], lambda job: specs.append(job.spec()))
    (spec,) = specs
    assert spec.train.lr == 5e-5
    task = build_task(spec.task)
    rows = load_splits(spec.task.data, ["train"], label=None, regression=False, seed=0)
    base = load_base(spec.model, **task.head, seed=0)
    examples = task.encode(rows["train"], base).examples
    optimizer = torch.optim.AdamW(base.model.parameters(), lr=spec.train.lr, weight_decay=0.0)
    theirs = []
    plan = BatchPlan([example.num_tokens for example in examples], 8, 1, spec.train.length_window, 0)
    for step, ((numbers,),) in zip(range(6), ((window,) for _, window in plan.steps(0, 6)), strict=True):
        batch = task.collate([examples[number] for number in numbers])
        loss = base.model.train()(**batch).loss
        for group in optimizer.param_groups:
            group["lr"] = spec.train.lr * rate(step, 6, spec.train)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(base.model.parameters(), 1.0)
        optimizer.step()
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[-1] != ours[0]


def test_an_adapter_beside_it_is_refused(data, refused) -> None:
    assert "lora.targets=['query']: empty with lora.variant=full, where everything trains" in refused(
        "train", "lora=full", "lora.targets=[query]"
    )
