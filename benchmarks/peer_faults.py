"""What users of PEFT and transformers' Trainer write to go on after a kill: python benchmarks/peer_faults.py FOLDER.

40 steps on a tiny BERT of drawn weights, a checkpoint every 5. Run again, it goes on from `get_last_checkpoint`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

__all__ = ["main"]

STEPS, SAVE_EVERY, ROWS, BATCH = 40, 5, 96, 8


def main(folder: str) -> None:
    """Train to the end and save the adapter in FOLDER/final."""
    import peft
    import torch
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    set_seed(0)
    torch.set_num_threads(1)
    config = BertConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=3
    )
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["query", "value", "dense"]
    )
    model = peft.get_peft_model(BertForSequenceClassification(config), lora)
    draw = torch.Generator().manual_seed(1)
    rows: list[dict[str, Any]] = [
        {
            "input_ids": torch.randint(5, 128, (16,), generator=draw).tolist(),
            "attention_mask": [1] * 16,
            "labels": n % 3,
        }
        for n in range(ROWS)
    ]
    output = Path(folder)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            save_steps=SAVE_EVERY,
            logging_steps=1,
            learning_rate=7e-3,
            seed=0,
            use_cpu=True,
            dataloader_pin_memory=False,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows,
    )
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    model.save_pretrained(str(output / "final"))
    (output / "losses.txt").write_text("".join(f"{row.get('loss')}\n" for row in trainer.state.log_history))


if __name__ == "__main__":
    main(sys.argv[1])
