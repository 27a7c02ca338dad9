"""Recipes from the command line: what is refused, what a run says of its recipe, every training for two steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_cli.options import conf_dir

RTE = ("recipe=roberta-base-glue", "task=rte")
CHANGES = ["task.max_length=64", "lora.r=4"]
LABELS = ("entailment", "neutral", "contradiction")
FAMILY = {
    "roberta-base": "tiny-roberta",
    "roberta-large": "tiny-roberta",
    "deberta-v2-xxlarge": "tiny-deberta-v2",
    "gpt2-medium": "tiny-gpt2",
    "gpt2-large": "tiny-gpt2",
    "t5-base": "tiny-t5",
    "flan-t5-base": "tiny-t5",
    "llama-2-7b": "tiny-llama",
}
"""Model of a recipe → the tiny one that is trained here in its place."""
DRY = (
    *("train.max_steps=2", "task.data.train_limit=16", "task.data.validation_limit=4", "task.data.test_limit=4"),
    *("task.max_length=64", "train.batch_size=4", "train.accumulation=1", "device.threads=1"),
)
BY_HAND = {
    "mnli": {"premise": "it rains", "hypothesis": "it is dry"},
    "dart": {"tripleset": [["a", "b", "c"]], "annotations": {"source": ["x"], "text": ["a is c"]}},
    "instruct": {"instruction": "say hi", "input": "", "output": "hi"},
    "chat": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
}
"""Task → a row, where the mirror has no rows to train on."""
# 4 bits and paged states are for a GPU, and rank 64 for wider layers.
ON_A_CPU = {"llama-2-7b-instruct": ["model.quantization=none", "train.optimizer=adamw", "lora.r=8"]}
QUICK = {
    ("roberta-base-glue", "cola"),
    ("gpt2-medium-nlg", "e2e"),
    ("flan-t5-base-summarization", "samsum"),
    ("llama-2-7b-instruct", "chat"),
}
TRAININGS = [
    pytest.param(file.parent.name, file.stem, marks=() if (file.parent.name, file.stem) in QUICK else pytest.mark.slow)
    for file in sorted((conf_dir() / "recipe").glob("*/*.yaml"))
]


def test_a_task_that_the_recipe_says_nothing_of_is_refused_in_one_line(refused) -> None:
    line = refused("train", "recipe=gpt2-medium-nlg", "task=sst2")
    assert line == "lora train: task=sst2: no such task of recipe=gpt2-medium-nlg. There are: dart, e2e, webnlg"
    assert "no such task of recipe=roberta-base-glue. There are: cola" in refused("train", "recipe=roberta-base-glue")


def test_a_recipe_of_ones_own_lies_in_conf(call, scratch: Path) -> None:
    (scratch / "conf" / "recipe" / "mine").mkdir(parents=True)
    top = "# @package _global_\nlora: {r: 2}\nrecipe: {name: mine, source: me, base: tiny-bert}\n"
    (scratch / "conf" / "recipe" / "mine.yaml").write_text(top)
    own = "# @package _global_\ntrain: {lr: 0.25}\nrecipe: {epochs: 1, batch_per_device: 4}\n"
    (scratch / "conf" / "recipe" / "mine" / "support_intents.yaml").write_text(own)
    answer = call("train", "recipe=mine", "--cfg", "job", "--package", "train")
    assert answer.code == 0, answer.err
    assert "lr: 0.25" in answer.out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["recipe=roberta-base-glu"], "no such recipe. Did you mean roberta-base-glue? There are: deberta"),
        (["recipe=roberta-base-glue/rte", "task=rte"], "recipe: name the recipe alone; task=NAME chooses which"),
        (["recipe.epochs=3"], "recipe.epochs: needs recipe=NAME besides"),
        ([*RTE, "train.epochs=1", "recipe.epochs=0"], "recipe.epochs=0.0: a number above 0"),
        ([*RTE, "train.accumulation=1", "recipe.devices=0"], "recipe.devices=0: a whole number, 1 or more"),
        ([*RTE, "lora.init_digest=ab"], "lora.init_digest=ab: null without lora.init_from"),
        ([*RTE, "lora.init_from=a", "lora=olora"], "lora.init=olora: kaiming with lora.init_from"),
        ([*RTE, "lora.init_from=nowhere"], "lora.init_from=nowhere: no such run"),
        ([*RTE, "train.warmup_steps=-1"], "train.warmup_steps=-1: a whole number, 0 or more, or null"),
        ([*RTE, "model.head_dropout=1"], "model.head_dropout=1.0: a share from 0"),
    ],
)
def test_wrong_words_are_refused(words: list[str], line: str, refused) -> None:
    assert line in refused("train", *words)


@pytest.mark.parametrize(("recipe", "task"), TRAININGS)
def test_each_training_takes_two_steps(recipe: str, task: str, call, mirror: Path, scratch: Path) -> None:
    words = list(ON_A_CPU.get(recipe, []))
    for split in ("train", "validation", "test") if task in BY_HAND else ():
        rows = [BY_HAND[task] | ({"label": label} if task == "mnli" else {}) for label in LABELS * 6]
        (scratch / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        words.append(f"task.data.{split}={split}.jsonl")
    words += ["task.extra_splits=[]"] * (task == "mnli")
    words += ["task.max_target_length=64"] * (task == "instruct")
    # In two of 10,000 steps' warm-up the rate moves no float, which the self-check would tell.
    words += ["train.warmup_steps=1"] * recipe.startswith("deberta")
    base = next(name for name in sorted(FAMILY, key=len, reverse=True) if recipe.startswith(name))
    answer = call("train", f"recipe={recipe}", f"task={task}", f"model={FAMILY[base]}", *DRY, *words)
    assert answer.code == 0, answer.err
    facts = json.loads(Path("runs/latest/run.json").read_text())
    assert facts["steps"] == 2
    assert {each["verdict"] for each in facts["expected"]} <= {"not comparable"}
    assert f"recipe     {recipe}: " in answer.err


def test_a_run_says_what_keeps_it_from_the_published_figure(call, mirror: Path) -> None:
    answer = call("train", *RTE, "model=tiny-roberta", *DRY, "lora.r=4")
    assert answer.code == 0, answer.err
    line = next(line for line in answer.out.splitlines() if "published" in line)
    assert line.partition(", published")[2] == (
        " 86.6 ± 0.7: not comparable: tiny-roberta of random weights in place of roberta-base, 16 of 2,490 train rows, "
        "4 of 277 validation rows, 2 of 320 steps, not begun with the adapter of mnli (lora.init_from)"
    )
    assert "warning    4 rows a step, 0.0156 times the recipe's 256 (32 × 8): train.batch_size, train." in answer.err
    assert "warning    the recipe starts from the adapter of mnli: lora.init_from=RUN" in answer.err
    (expected,) = json.loads(Path("runs/latest/run.json").read_text())["expected"]
    assert (expected["verdict"], expected["published"], expected["changes"]) == ("not comparable", 86.6, CHANGES)
    # A run's configuration is whole: what comes after needs no file of the recipe.
    assert call("eval", "run=latest").code == 0
    assert "not comparable" in call("resume", "run=latest").out


def test_the_recipes_batch_in_another_shape_is_no_other_batch(call, mirror: Path) -> None:
    words = ("recipe.batch_per_device=4", "train.batch_size=1", "train.accumulation=32")
    answer = call("train", *RTE, "model=tiny-roberta", *DRY, *words, "train.max_steps=1")
    assert answer.code == 0, answer.err
    assert "rows a step" not in answer.err
