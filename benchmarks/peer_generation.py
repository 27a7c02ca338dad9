"""PEFT's model answering the prompts of a run's test split, greedily."""

from __future__ import annotations

from typing import Any

from peer_run import Run, base_model, encoded, tokenizer_of

__all__ = ["answer"]

Notes = dict[str, Any]
ONE_BY_ONE = 32
"""Prompts that are answered one by one; all of them would take long, and one is like the other."""


def answer(run: Run, *, batch_size: int) -> Notes:
    """Answer in batches of `batch_size`, in the order of the data: tokens and pace."""
    import torch
    from peft import PeftModel

    from watch import watch_generation

    notes: Notes = {}
    tokenizer = tokenizer_of(run)
    tokenizer.padding_side = "left"
    model = PeftModel.from_pretrained(base_model(run), str(run.path / "adapter")).eval()
    prompts = [query.input_ids for query in encoded(run, tokenizer, "test").queries]
    prompts = prompts[:ONE_BY_ONE] if batch_size == 1 else prompts
    watch_generation(notes)
    for start in range(0, len(prompts), batch_size):
        batch: Any = tokenizer.pad({"input_ids": prompts[start : start + batch_size]}, return_tensors="pt")
        with torch.inference_mode():
            found = model.generate(
                **batch,
                max_new_tokens=run.task.decode.max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        tokenizer.batch_decode(found[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return notes
