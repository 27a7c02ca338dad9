"""A decoder of GPT-2's shape, its weights drawn, its tokenizer made of E2E's texts: python decoder_model.py FOLDER.

What it writes means nothing; what it costs is what a trained one of this size costs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pyarrow.parquet as pq
import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from pretrain import POSITIONS, byte_level_bpe

END = "<|endoftext|>"
VOCABULARY = 8192


def texts() -> list[str]:
    """Everything that E2E's train split says."""
    folder = Path(os.environ["LORA_HUB_ROOT"]) / "datasets" / "tuetschek" / "e2e_nlg" / "default"
    rows = [row for file in sorted(folder.glob("train-*.parquet")) for row in pq.read_table(file).to_pylist()]
    return [text for row in rows for text in row.values()]


def main(folder: Path) -> None:
    """Make the folder: weights, config, tokenizer."""
    tokenizer = byte_level_bpe(texts(), [END], vocabulary=VOCABULARY, bos_token=END, eos_token=END, unk_token=END)
    end = tokenizer.eos_token_id
    torch.manual_seed(0)
    # The vocabulary may be smaller than its table: E2E has few words, and the table's size is what costs.
    shape = {"vocab_size": VOCABULARY, "n_positions": POSITIONS, "n_embd": 384, "n_layer": 6, "n_head": 6}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=end, eos_token_id=end))
    # The logit of the end mark is then 0, which is never the largest: all sides write as many tokens as they may.
    model.transformer.wte.weight.data[end] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
