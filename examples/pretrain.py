"""A small base model of one's own from the text of a local mirror: `python examples/pretrain.py gpt2 FOLDER`, or t5.

Nothing is downloaded. The text is what the mirror (LORA_HUB_ROOT, or --data) has of English prose: train splits of
GLUE, CB, COPA and SAMSum, and of SNLI, MNLI and BoolQ, whose train splits a small mirror may lack, the validation
split's text, never its labels. SAMSum rows whose dialogue also stands in its other splits are left out.

gpt2 (causal language model) also reads WebNLG's train split and DART's validation split as `triples<|endoftext|> text`,
so that it learns to put data into words. **No E2E NLG at all**, nor the texts in DART that come from it: E2E is what
LoRA is then trained on. DART's texts from WebNLG are left out too, being WebNLG's own validation split.

t5 (encoder and decoder) learns span corruption (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4) and, every second
step, to write the turn that says most about its dialogue (PEGASUS, Zhang et al. 2020, arXiv:1912.08777, section 3.1).
SAMSum's train summaries are in as plain text of the first objective, never beside their dialogue.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from denoising import SENTINELS, Batch, corrupt, gap, padded
from mirror_text import END, data_to_text, dialogues, prose, split

VOCABULARY, POSITIONS, ROW, DIALOGUE = 4096, 512, 192, 256


def byte_level_bpe(
    texts: Sequence[str], special: Sequence[str], *, vocabulary: int = VOCABULARY, **roles: Any
) -> PreTrainedTokenizerFast:
    """A tokenizer without unknown characters: every byte is a token, and the most frequent neighbours are merged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if "pad_token" in roles:  # T5 ends every text
        end = roles["eos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            f"$A {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **roles)


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without an end."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def pack(texts: Sequence[list[int]], end: int) -> torch.Tensor:
    """(rows, ROW): all texts after each other, each with its end; what fills no row is dropped."""
    stream = torch.tensor([token for text in texts for token in [*text, end]])
    width = min(ROW, len(stream))
    return stream[: len(stream) // width * width].view(-1, width)


def endless(number: int, batch_size: int, rng: random.Random) -> Iterator[list[int]]:
    """Indices of one batch after the other, in a new order each epoch."""
    while True:
        order = rng.sample(range(number), number)
        yield from (order[i : i + batch_size] for i in range(0, number, batch_size))


@dataclass
class Plan:
    """What one training needs: the optimizer with its highest rate, and the held-out batches of each objective."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    optimizer: torch.optim.Optimizer
    train: Iterator[Batch]
    held_out: dict[str, list[Batch]]


def plan_gpt2(root: Path, batch_size: int, rng: random.Random) -> Plan:
    """A causal language model of 2.7 M parameters."""
    train, held_out = split(prose(root) + dialogues(root) + data_to_text(root), rng)
    tokenizer = byte_level_bpe(train, [END], bos_token=END, eos_token=END, unk_token=END)
    end = tokenizer.eos_token_id
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=POSITIONS, n_embd=192, n_layer=4, n_head=4,
            activation_function="gelu_pytorch_tanh",
            bos_token_id=end, eos_token_id=end, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip
    blocks = pack(encode(tokenizer, train), end)

    def batches() -> Iterator[Batch]:
        for chosen in endless(len(blocks), batch_size, rng):
            ids = blocks[chosen]
            # Every second batch starts later: or no position after ROW would ever be learnt.
            start = rng.choice([0, rng.randrange(POSITIONS - ROW)])
            positions = torch.arange(start, start + ids.shape[1]).expand_as(ids)
            yield {"input_ids": ids, "labels": ids, "position_ids": positions}

    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    fresh = pack(encode(tokenizer, held_out), end).split(batch_size)
    return Plan(model, tokenizer, optimizer, batches(), {"text": [{"input_ids": ids, "labels": ids} for ids in fresh]})


def plan_t5(root: Path, batch_size: int, rng: random.Random) -> Plan:
    """An encoder and decoder of 3.9 M parameters."""
    talks, held_out_talks = split(dialogues(root), rng)
    train, held_out = split(prose(root), rng)
    special = ["<pad>", "</s>", *SENTINELS]
    roles = {"pad_token": "<pad>", "eos_token": "</s>", "extra_special_tokens": SENTINELS}
    tokenizer = byte_level_bpe(train + talks, special, **roles)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer), d_model=192, d_kv=64, d_ff=768, num_layers=3, num_heads=3, dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id, tie_word_embeddings=True,
        )
    )  # fmt: skip
    sentinels, end = tokenizer.convert_tokens_to_ids(SENTINELS), tokenizer.eos_token_id

    def spans(blocks: torch.Tensor, rng: random.Random) -> Batch:
        pairs = [corrupt(ids, sentinels, rng) for ids in blocks.tolist()]
        return padded([(source, [*target, end]) for source, target in pairs])

    def gaps(talks: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        sources, targets = zip(*[gap(talk) for talk in talks if talk.count("\n") >= 2], strict=True)
        pairs = zip(encode(tokenizer, sources), encode(tokenizer, targets), strict=True)
        return [([*source, end], [*target, end]) for source, target in pairs if len(source) < DIALOGUE]

    blocks, turns = pack(encode(tokenizer, train + talks), end), gaps(talks)

    def batches() -> Iterator[Batch]:
        both = zip(endless(len(blocks), batch_size, rng), endless(len(turns), batch_size, rng), strict=True)
        for some_blocks, some_turns in both:
            yield spans(blocks[some_blocks], rng)
            yield padded([turns[i] for i in some_turns])

    fresh, fresh_turns = pack(encode(tokenizer, held_out), end), gaps(held_out_talks or talks)
    fixed = random.Random(0)
    held = {
        "spans": [spans(some, fixed) for some in fresh.split(batch_size)],
        "turns": [padded(fresh_turns[i : i + batch_size]) for i in range(0, len(fresh_turns), batch_size)],
    }
    # As T5 was trained: steps relative to a weight's size, which is 1 in its embeddings and 0.07 and less elsewhere.
    optimizer = torch.optim.Adafactor(model.parameters(), lr=2e-2)
    return Plan(model, tokenizer, optimizer, batches(), held)


def fit(plan: Plan, *, steps: int | None, minutes: float) -> float:
    """Train, the rate a cosine over the share of steps or of time; return tokens per second."""
    peak = plan.optimizer.param_groups[0]["lr"]
    start, num_tokens, losses, step = time.monotonic(), 0, [], 0
    while (share := step / steps if steps else (time.monotonic() - start) / (60 * minutes)) < 1:
        batch = next(plan.train)
        loss = plan.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plan.model.parameters(), 1.0)
        for group in plan.optimizer.param_groups:
            group["lr"] = peak * min(1.0, max(share, 1e-4) / 0.03) * (1 + math.cos(math.pi * share)) / 2
        plan.optimizer.step()
        plan.optimizer.zero_grad()
        step, num_tokens, losses = step + 1, num_tokens + batch["input_ids"].numel(), [*losses[-99:], loss.item()]
        if step % 100 == 0:
            speed = num_tokens / (time.monotonic() - start)
            told = f"step {step:6d}   loss {sum(losses) / len(losses):.3f}   {speed:.0f} tokens/s   {share:.0%}"
            print(told, file=sys.stderr, flush=True)
    return num_tokens / (time.monotonic() - start)


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """exp of the mean negative log-likelihood of a target token."""
    model.eval()
    nll = num = 0.0
    for batch in batches:
        # A causal model's first label is never predicted.
        counted = int((batch["labels"][:, 0 if model.config.is_encoder_decoder else 1 :] != -100).sum())
        nll, num = nll + model(**batch).loss.item() * counted, num + counted
    return math.exp(nll / num)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the folder: model.safetensors, config, tokenizer."""
    parser = argparse.ArgumentParser(description="Train a small base model on the text of a local mirror.")
    parser.add_argument("kind", choices=["gpt2", "t5"])
    parser.add_argument("folder", type=Path, help="where the model is written")
    parser.add_argument("--data", type=Path, default=os.environ.get("LORA_HUB_ROOT"), help="the mirror; LORA_HUB_ROOT")
    bound = parser.add_mutually_exclusive_group()
    bound.add_argument("--minutes", type=float, default=20.0, help="train this long (20)")
    bound.add_argument("--steps", type=int, help="train this many steps, the same at each call")
    parser.add_argument("--batch-size", type=int, default=4, help=f"rows of {ROW} tokens a step (4)")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.data is None or not (args.data / "datasets").is_dir():
        parser.error("no mirror: LORA_HUB_ROOT or --data names a folder that holds datasets/")
    disable_progress_bar()
    set_verbosity_error()
    torch.manual_seed(args.seed)
    plan = (plan_gpt2 if args.kind == "gpt2" else plan_t5)(args.data, args.batch_size, random.Random(args.seed))
    num = sum(parameter.numel() for parameter in plan.model.parameters())
    print(f"{args.kind} · {num / 1e6:.2f} M parameters · vocabulary {len(plan.tokenizer)}")
    speed = fit(plan, steps=args.steps, minutes=args.minutes)
    for name, batches in plan.held_out.items():
        print(f"held-out perplexity ({name}) {perplexity(plan.model, batches):.2f}")
    plan.model.save_pretrained(args.folder)
    plan.tokenizer.save_pretrained(args.folder)
    print(f"{speed:.0f} tokens/s\n{args.folder}")


if __name__ == "__main__":
    main()
