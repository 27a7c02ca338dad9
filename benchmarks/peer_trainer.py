"""PEFT and transformers' Trainer, as their users put them together; without PEFT, full fine-tuning."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from lora_cli.engine.batches import BatchPlan
from lora_cli.spec import TrainSpec
from peer_run import Run, base_model, check_same_size, examples, tokenizer_of

__all__ = ["train"]

Notes = dict[str, Any]
PEFT_TYPES = {"classification": "SEQ_CLS", "generation": "CAUSAL_LM"}
PEFT_TARGETS = {"classification": ["query", "value"], "generation": ["attn.c_attn"]}


def train(run: Run, *, grouped: bool = False, start_as_ours: bool = False) -> Notes:
    """Train as ours did, score after each epoch, save the adapter of the best.

    With train.length_window=1 the batches are ours, else the Trainer shuffles by itself, and with `grouped` puts rows
    of like length together. With `start_as_ours` A and head begin where ours did: what differs at the end is then not
    due to the start.
    """
    import transformers

    from watch import watch_steps

    notes: Notes = {}
    transformers.set_seed(run.seed)
    model, tokenizer = _adapted(run), tokenizer_of(run)
    if start_as_ours:
        _start_as_ours(model, run)
    data = {split: examples(run, tokenizer, split) for split in ("train", "validation")}
    stopwatch, spec = _stopwatch(), run.train
    watch_steps(notes)
    classify = run.task.kind == "classification"
    trainer = _trainer_class(spec, len(data["train"]), run.facts["data_seed"], grouped=grouped)(
        model=model,
        args=_arguments(run, grouped=grouped),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=_collator(tokenizer, classify=classify),
        compute_metrics=(lambda scored: _metrics(run, scored.predictions, scored.label_ids)) if classify else None,
        callbacks=[stopwatch],
    )
    done = trainer.train()
    model.save_pretrained(str(run.path / "peer"))
    scorings = [entry for entry in trainer.state.log_history if "eval_runtime" in entry]
    kept = trainer.state.best_global_step or scorings[-1]["step"]
    scored = next(entry for entry in scorings if entry["step"] == kept)
    names = [*(run.task.metrics if classify else ()), "loss"]
    return notes | {
        "metrics": {name: scored[f"eval_{name}"] for name in names},
        "train_rows_per_s": len(data["train"]) * spec.epochs / stopwatch.train_s,
        "eval_rows_per_s": len(data["validation"]) / scored["eval_runtime"],
        "train_loss": done.training_loss,
    }


def _adapted(run: Run) -> Any:
    """PEFT's model on the base model that ours used; without an adapter where ours trained all of it."""
    import peft

    model: Any = base_model(run)
    if run.lora.variant == "full":
        check_same_size(run, model)
        return model
    config = peft.LoraConfig(
        task_type=PEFT_TYPES[run.task.kind],
        r=run.lora.r,
        lora_alpha=run.lora.alpha,
        lora_dropout=run.lora.dropout,
        target_modules=PEFT_TARGETS[run.task.kind],
        fan_in_fan_out=run.facts["base"]["family"] == "gpt2",
    )
    model = peft.get_peft_model(model, config)
    check_same_size(run, model)
    return model


def _start_as_ours(model: Any, run: Run) -> None:
    """Give the peer the A and the head that ours began with."""
    from lora_cli.models import load_base
    from lora_cli.nn import adapted_layers, inject

    labels, seed = run.facts["labels"], run.facts["init_seed"]
    problem = "classification" if labels else "regression"
    ours = load_base(run.model, num_outputs=len(labels or [0]), labels=labels, problem=problem, seed=seed)
    inject(ours.model, run.lora, groups=ours.groups, fresh=ours.fresh, skip=ours.skip, seed=seed)
    for name, layer in adapted_layers(ours.model).items():
        model.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.data.copy_(layer.A.data)
    for name in ours.fresh:
        target = model.get_submodule(f"base_model.model.{name}").modules_to_save["default"]
        target.load_state_dict(ours.model.get_submodule(name).state_dict())


def _trainer_class(train: TrainSpec, num_rows: int, seed: int, *, grouped: bool) -> Any:
    """The Trainer; for a plain random order (train.length_window=1) one that draws the batches that ours drew."""
    from torch.utils.data import Sampler
    from transformers import Trainer

    if train.length_window > 1 or grouped:
        return Trainer
    plan = BatchPlan([1] * num_rows, train.batch_size, 1, 1, seed)

    class Order(Sampler[int]):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return num_rows

        def __iter__(self) -> Iterator[int]:
            return (number for batch in plan.batches(self.epoch) for number in batch)

    class InOurOrder(Trainer):  # type: ignore[misc, unused-ignore]
        def _get_train_sampler(self, *_: Any) -> Order:
            return Order()

    return InOurOrder


def _collator(tokenizer: Any, *, classify: bool) -> Any:
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    # The one that pads labels as well, with -100.
    return DataCollatorWithPadding(tokenizer) if classify else DataCollatorForSeq2Seq(tokenizer)


def _arguments(run: Run, *, grouped: bool) -> Any:
    from transformers import TrainingArguments

    train, metric = run.train, run.task.metrics[0] if run.task.kind == "classification" else "loss"
    return TrainingArguments(
        output_dir=str(run.path / "trainer"),
        num_train_epochs=train.epochs,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.eval_batch_size,
        train_sampling_strategy="group_by_length" if grouped else "random",
        learning_rate=train.lr,
        lr_scheduler_type=train.schedule,
        warmup_steps=train.warmup,  # a share, below 1
        weight_decay=train.weight_decay,
        adam_beta1=train.betas[0],
        adam_beta2=train.betas[1],
        adam_epsilon=train.eps,
        max_grad_norm=train.max_grad_norm,
        seed=run.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=train.keep,
        load_best_model_at_end=train.restore_best,
        metric_for_best_model=metric,
        greater_is_better=metric != "loss",
        logging_steps=train.log_every,
        # What it scores texts by is the loss alone; all logits of a split would not fit into memory.
        prediction_loss_only=metric == "loss",
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
    )


def _metrics(run: Run, logits: Any, labels: Any) -> dict[str, float]:
    from lora_cli.tasks.metrics import score

    predictions = logits.squeeze(-1) if run.task.regression else logits.argmax(-1)
    values = {name: score(name, predictions=predictions, references=labels)[0] for name in run.task.metrics}
    # The Trainer compares metrics, and NaN is its only number that is better than none.
    return {name: float("nan") if value is None else value for name, value in values.items()}


def _stopwatch() -> Any:
    """A callback whose `train_s` is the time in epochs; the Trainer scores and saves between them."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):  # type: ignore[misc, unused-ignore]
        train_s = 0.0

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            self._started = time.perf_counter()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            self.train_s += time.perf_counter() - self._started

    return Stopwatch()
