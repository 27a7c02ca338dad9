"""Answers to prompts: batched, longest first, with transformers' own decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from lora_cli.engine.batches import by_length
from lora_cli.engine.device import Device
from lora_cli.growing_cache import growing_cache
from lora_cli.prepacked import laid_out
from lora_cli.spec import DecodeSpec
from lora_cli.unpadded import can_remove_padding

__all__ = ["Asked", "ends_of", "generate", "has_stop", "padded", "text_of"]


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
    wrote: Callable[[int, list[int]], None] | None = None,
) -> Iterator[tuple[int, str]]:
    """(query number, answer) of each query, batch by batch. The model is left in eval mode.

    `streamer` (transformers' interface) is given the tokens of a single query as they come; `progress` is told
    (queries done, of all), `wrote` (query number, the tokens of its answer with what ended it). Drawn answers depend on
    (`seed`, batch): the same call gives the same ones. Of several processes each answers its part.
    """
    model.eval()
    config = _config(model, decode, tokenizer)
    writes_on, pad, done = not model.config.is_encoder_decoder, int(tokenizer.pad_token_id), 0
    # Not all others keep keys and values in transformers' ordinary cache.
    is_known = can_remove_padding(model.config.model_type, writes=True)
    batches = list(enumerate(by_length([query.num_tokens for query in queries], batch_size)))
    with laid_out(model, limit_mib=device.prepack_mib):
        for (number, indices), counts in device.world.own(batches):
            batch = device.move(padded([queries[index].input_ids for index in indices], pad, left=writes_on))
            # A decoder's output begins with its prompt, an encoder-decoder's with its start token.
            start = batch["input_ids"].shape[1] if writes_on else 1
            if is_known:
                batch = {**batch, "past_key_values": growing_cache(model.config)}
            if decode.sample:
                device.seed(seed, number, 0)
            with device.without_gradients(), device.autocast(), _without_settings(model):
                found = model.generate(
                    **batch,
                    generation_config=config,
                    stopping_criteria=[_stopped(tokenizer, decode.stop, start)] if decode.stop else None,
                    streamer=streamer,
                    # Who holds a part of the weights is needed until the last has ended.
                    synced_gpus=device.world.is_sharded,
                )
            if not counts:
                continue
            done += len(indices)
            progress(done, len(queries))
            for index, ids in zip(indices, found[:, start:].tolist(), strict=True):
                if wrote is not None:
                    wrote(index, _written(ids, tokenizer, config.eos_token_id, decode.stop))
                yield index, text_of(ids, tokenizer, config.eos_token_id, decode.stop)


def _config(model: Any, decode: DecodeSpec, tokenizer: Any) -> Any:
    from transformers import GenerationConfig

    drawing = {"temperature": decode.temperature, "top_p": decode.top_p, "top_k": decode.top_k or 0}
    beams = {"length_penalty": decode.length_penalty, "early_stopping": False} if decode.num_beams > 1 else {}
    return GenerationConfig(
        max_new_tokens=decode.max_new_tokens,
        num_beams=decode.num_beams,
        do_sample=decode.sample,
        no_repeat_ngram_size=decode.no_repeat_ngram,
        repetition_penalty=decode.repetition_penalty,
        eos_token_id=ends_of(model, tokenizer, decode.stop),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        use_cache=True,
        **(drawing if decode.sample else {}),
        **beams,
    )


def ends_of(model: Any, tokenizer: Any, stops: Sequence[str]) -> list[int]:
    """The tokenizer's end mark, the end marks of turns that the checkpoint lists besides, and stops that are tokens."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    listed = [listed] if isinstance(listed, int) else list(listed or [])
    added = tokenizer.get_added_vocab()
    return list(
        dict.fromkeys([int(tokenizer.eos_token_id), *listed, *(added[stop] for stop in stops if stop in added)])
    )


def _written(ids: list[int], tokenizer: Any, ends: Sequence[int], stops: Sequence[str]) -> list[int]:
    """A row of a batch without what fills it up."""
    lengths = range(1, len(ids) + 1)
    return ids[: next((n for n in lengths if ids[n - 1] in ends or has_stop(ids[:n], tokenizer, stops)), len(ids))]


def _stopped(tokenizer: Any, stops: Sequence[str], start: int) -> Callable[..., torch.Tensor]:
    """Which sequences hold a stop text behind position `start`. transformers' own criterion reads the prompt as well,
    and fails on small vocabularies."""

    def stopped(ids_NT: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        rows = ids_NT[:, start:].tolist()
        return torch.tensor([has_stop(ids, tokenizer, stops) for ids in rows], device=ids_NT.device)

    return stopped


def has_stop(ids: Sequence[int], tokenizer: Any, stops: Sequence[str]) -> bool:
    """Whether one of the `stops` stands at the end of what these tokens say."""
    if not stops:
        return False
    # A character has four bytes at most, and a byte is a token at worst.
    window = 4 * max(map(len, stops)) + 8
    text = _decoded(list(ids[-window:]), tokenizer)
    return any(stop in text for stop in stops)


@contextmanager
def _without_settings(model: Any) -> Iterator[None]:
    """What a config leaves open, transformers fills from the checkpoint's: forced tokens, least lengths, and such.

    And where it drops a mask of ones, it takes an end mark that is the pad token for padding, and prints advice.
    """
    from transformers import GenerationConfig

    own, pad = model.generation_config, model.config.pad_token_id
    model.generation_config, model.config.pad_token_id = GenerationConfig(), None
    try:
        yield
    finally:
        model.generation_config, model.config.pad_token_id = own, pad


def padded(sequences: Sequence[list[int]], pad: int, *, left: bool) -> Mapping[str, torch.Tensor]:
    """input_ids and attention_mask (N, longest).

    A decoder goes on where its prompt ends, so it is padded on the left; an encoder counts from the first token."""
    longest = max(map(len, sequences))
    gaps = [longest - len(sequence) for sequence in sequences]
    rows = zip(sequences, gaps, strict=True)
    ids = [[pad] * gap + sequence if left else sequence + [pad] * gap for sequence, gap in rows]
    ones = [[1] * len(sequence) for sequence in sequences]
    mask = [[0] * gap + one if left else one + [0] * gap for one, gap in zip(ones, gaps, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def text_of(ids: list[int], tokenizer: Any, ends: Sequence[int], stops: Sequence[str]) -> str:
    """What was generated, up to an end mark or a stop text."""
    ids = ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]
    text = _decoded(ids, tokenizer)
    for stop in stops:
        text = text.partition(stop)[0]
    return text.strip()


def _decoded(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
