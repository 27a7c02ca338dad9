"""Answers to prompts: batched, longest first, padded on the left, with transformers' own decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from lora_cli.engine.batches import by_length
from lora_cli.engine.device import Device
from lora_cli.spec import DecodeSpec

__all__ = ["Asked", "generate"]


class Asked(Protocol):
    """One encoded prompt."""

    @property
    def input_ids(self) -> list[int]: ...

    @property
    def num_tokens(self) -> int: ...


def generate(
    model: Any,
    queries: Sequence[Asked],
    decode: DecodeSpec,
    *,
    tokenizer: Any,
    device: Device,
    batch_size: int,
    seed: int = 0,
    streamer: Any = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[int, str]]:
    """(query number, answer) of each query, batch by batch. The model is left in eval mode.

    `streamer` (transformers' interface) is given the tokens of a single query as they come; `progress` is told
    (queries done, of all). Drawn answers depend on (`seed`, batch): the same call gives the same ones.
    """
    model.eval()
    config = _config(model, decode, tokenizer)
    done = 0
    for number, indices in enumerate(by_length([query.num_tokens for query in queries], batch_size)):
        batch = device.move(_left_padded([queries[index].input_ids for index in indices], int(tokenizer.pad_token_id)))
        if decode.sample:
            device.seed(seed, number, 0)
        with torch.inference_mode(), device.autocast():
            found = model.generate(
                **batch,
                generation_config=config,
                tokenizer=tokenizer if decode.stop else None,
                streamer=streamer,
            )
        # A decoder's output begins with its prompt, an encoder-decoder's with its start token.
        start = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
        done += len(indices)
        progress(done, len(queries))
        yield from zip(indices, (_text(ids, tokenizer, decode.stop) for ids in found[:, start:].tolist()), strict=True)


def _config(model: Any, decode: DecodeSpec, tokenizer: Any) -> Any:
    """Every setting from ours: what a checkpoint brings along (temperatures, lengths) is not what was asked for."""
    from transformers import GenerationConfig

    drawing = {"temperature": decode.temperature, "top_p": decode.top_p, "top_k": decode.top_k or 0}
    beams = {"length_penalty": decode.length_penalty, "early_stopping": False} if decode.num_beams > 1 else {}
    return GenerationConfig(
        max_new_tokens=decode.max_new_tokens,
        num_beams=decode.num_beams,
        do_sample=decode.sample,
        no_repeat_ngram_size=decode.no_repeat_ngram,
        repetition_penalty=decode.repetition_penalty,
        stop_strings=list(decode.stop) or None,
        eos_token_id=_ends(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        use_cache=True,
        **(drawing if decode.sample else {}),
        **beams,
    )


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokenizer's end mark, and the end marks of turns that the checkpoint lists besides."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    listed = [listed] if isinstance(listed, int) else list(listed or [])
    return list(dict.fromkeys([int(tokenizer.eos_token_id), *listed]))


def _left_padded(sequences: Sequence[list[int]], pad: int) -> Mapping[str, torch.Tensor]:
    longest = max(map(len, sequences))
    ids = [[*[pad] * (longest - len(sequence)), *sequence] for sequence in sequences]
    mask = [[*[0] * (longest - len(sequence)), *[1] * len(sequence)] for sequence in sequences]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _text(ids: list[int], tokenizer: Any, stops: Sequence[str]) -> str:
    """What was generated, up to the end mark or a stop text."""
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    text = str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    for stop in stops:
        text = text.partition(stop)[0]
    return text.strip()
