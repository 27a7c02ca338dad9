"""A run of ours as a peer reads it: its settings, its rows and tokens, the base model it began with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lora_cli.runs.directory import RunDirectory, read_saved_config
from lora_cli.spec import TASK_KINDS, AdaLoraSpec, DataSpec, DecodeSpec, LoraSpec, ModelSpec, TaskSpec, TrainSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Run", "base_model", "check_same_size", "encoded", "examples", "tokenizer_of"]

SAFE = {"local_files_only": True, "trust_remote_code": False}
AUTO = {"classification": "AutoModelForSequenceClassification", "generation": "AutoModelForCausalLM"}


@dataclass(frozen=True)
class Run:
    """What ours did, as its run folder tells it."""

    path: Path
    facts: Mapping[str, Any]
    seed: int
    task: TaskSpec
    model: ModelSpec
    lora: LoraSpec
    train: TrainSpec

    @classmethod
    def read(cls, path: Path) -> Run:
        config = read_saved_config(path)
        task, lora = config["task"], config["lora"]
        nested = {"data": DataSpec, "decode": DecodeSpec}
        task |= {name: spec(**task[name]) for name, spec in nested.items() if name in task}
        lora |= {"adalora": AdaLoraSpec(**lora["adalora"])}
        return cls(
            path=path,
            facts=RunDirectory(path).facts(),
            seed=config["seed"],
            task=TASK_KINDS[task["kind"]](**task),
            model=ModelSpec(**config["model"]),
            lora=LoraSpec(**lora),
            train=TrainSpec(**config["train"]),
        )

    @property
    def head(self) -> dict[str, Any]:
        """What transformers has to know of the task."""
        if self.task.kind == "generation":
            return {}
        labels = self.facts["labels"]
        return {"num_labels": len(labels)} if labels else {"num_labels": 1, "problem_type": "regression"}


def base_model(run: Run) -> PreTrainedModel:
    """transformers' model from the folder that ours read, with the dropout that ours had."""
    import transformers

    from lora_cli.sources import find_source

    folder = str(find_source(run.model).folder)
    config = transformers.AutoConfig.from_pretrained(folder, **run.head, **SAFE)
    if run.model.dropout is not None:
        for key in config.to_dict():
            if "dropout" in key or "pdrop" in key:
                setattr(config, key, run.model.dropout)
    auto = getattr(transformers, AUTO[run.task.kind])
    return auto.from_pretrained(folder, config=config, use_safetensors=True, **SAFE)


def tokenizer_of(run: Run) -> Any:
    """The base model's tokenizer, able to pad."""
    from transformers import AutoTokenizer

    from lora_cli.sources import find_source

    tokenizer = AutoTokenizer.from_pretrained(str(find_source(run.model).folder), **SAFE)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def encoded(run: Run, tokenizer: Any, split: str) -> Any:
    """The rows that ours had and, of texts, their tokens: how prompt and answer are put together is the task's."""
    from lora_cli.tasks import build_task, load_rows

    task = build_task(run.task, labels=run.facts["labels"])
    rows = load_rows(task, [split], seed=run.facts["data_seed"])[split]
    known = run.facts["data"].get(split)
    assert known is None or rows.fingerprint == known["fingerprint"], f"the peer has other {split} rows than ours"
    if run.task.kind == "generation":
        return task.encode(rows, SimpleNamespace(tokenizer=tokenizer, decoder_start=None))
    return rows


def examples(run: Run, tokenizer: Any, split: str) -> list[dict[str, Any]]:
    """A split as the Trainer wants it."""
    found = encoded(run, tokenizer, split)
    if run.task.kind == "generation":
        return [
            {"input_ids": each.input_ids, "attention_mask": [1] * len(each.input_ids), "labels": each.labels}
            for each in found.examples
        ]
    texts = [[row[column] for row in found] for column in run.task.text]
    tokens = tokenizer(*texts, truncation=True, max_length=run.task.max_length)
    answers, labels = [row[run.task.label] for row in found], run.facts["labels"]
    numbers = [labels.index(answer) if isinstance(answer, str) else answer for answer in answers]
    columns = {**tokens, "labels": numbers}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def check_same_size(run: Run, model: Any) -> None:
    """Refuse to be compared with a training of another number of parameters."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable == run.facts["parameters"]["trainable"], "the peer does not train what ours did"
