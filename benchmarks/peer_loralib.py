"""loralib as its own examples use it: layers exchanged by hand, a plain loop, batches padded to their longest row."""

from __future__ import annotations

import time
from typing import Any

from lora_cli.engine.batches import BatchPlan
from peer_run import Run, base_model, check_same_size, examples, tokenizer_of

__all__ = ["train"]

Notes = dict[str, Any]


def train(run: Run) -> Notes:
    """Train as ours did, on its batches, and score once."""
    import torch
    from transformers import DataCollatorWithPadding, set_seed

    from watch import watch_steps

    notes: Notes = {}
    set_seed(run.seed)
    model, tokenizer = _adapted(run), tokenizer_of(run)
    data = {split: examples(run, tokenizer, split) for split in ("train", "validation")}
    collate, spec = DataCollatorWithPadding(tokenizer), run.train
    plan = BatchPlan([1] * len(data["train"]), spec.batch_size, 1, spec.length_window, run.facts["data_seed"])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = round(spec.epochs * plan.steps_per_epoch)
    optimizer, schedule = _optimized(run, parameters, total)
    watch_steps(notes)
    losses, started = [], time.perf_counter()
    model.train()
    for _, (numbers,) in plan.steps(0, total):
        loss = model(**collate([data["train"][number] for number in numbers])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, spec.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    train_s = time.perf_counter() - started
    started, right = time.perf_counter(), 0
    model.eval()
    rows = data["validation"]
    for first in range(0, len(rows), spec.eval_batch_size):
        batch = collate(rows[first : first + spec.eval_batch_size])
        with torch.inference_mode():
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return notes | {
        "metrics": {"accuracy": right / len(rows)},
        "train_rows_per_s": len(data["train"]) * spec.epochs / train_s,
        "eval_rows_per_s": len(rows) / (time.perf_counter() - started),
        "train_loss": sum(losses) / len(losses),
    }


def _optimized(run: Run, parameters: list[Any], steps: int) -> tuple[Any, Any]:
    """AdamW and the schedule, set as ours were."""
    import torch
    from transformers import get_scheduler

    spec = run.train
    optimizer = torch.optim.AdamW(
        parameters, lr=spec.lr, betas=tuple(spec.betas), eps=spec.eps, weight_decay=spec.weight_decay
    )
    return optimizer, get_scheduler(spec.schedule, optimizer, round(spec.warmup * steps), steps)


def _adapted(run: Run) -> Any:
    """The base model with loralib's layers for query and value."""
    import loralib

    model = base_model(run)
    for module in list(model.modules()):
        for name in ("query", "value"):
            base = getattr(module, name, None)
            if base is None:
                continue
            layer = loralib.Linear(
                base.in_features,
                base.out_features,
                r=run.lora.r,
                lora_alpha=run.lora.alpha,
                lora_dropout=run.lora.dropout,
            )
            layer.load_state_dict(base.state_dict(), strict=False)
            setattr(module, name, layer)
    loralib.mark_only_lora_as_trainable(model)
    for name in run.facts["trained_whole"]:
        model.get_submodule(name).requires_grad_(True)
    check_same_size(run, model)
    return model
