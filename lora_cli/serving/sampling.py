"""The next token of a row, from its logits: drawn by a generator of its own, so that company changes nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_cli.spec import DecodeSpec

__all__ = ["drawn", "generator_of", "ranked"]


def generator_of(seed: int) -> torch.Generator:
    """A row's own; on the CPU, so that every device draws the same."""
    return torch.Generator().manual_seed(seed)


def drawn(logits_V: Tensor, decode: DecodeSpec, generator: torch.Generator) -> int:
    """A token drawn at `decode.temperature` from the likeliest `top_k`, of those from the likeliest that make up
    `top_p`."""
    # Of doubles below 0 whatever temperature leaves the likeliest finite.
    scores_V = logits_V.cpu().double()
    scores_V = (scores_V - scores_V.max()) / decode.temperature
    if decode.top_k is not None and decode.top_k < len(scores_V):
        scores_V = scores_V.masked_fill(scores_V < scores_V.topk(decode.top_k).values[-1], -torch.inf)
    if decode.top_p < 1:
        sorted_V, order_V = scores_V.softmax(-1).sort(descending=True)
        # What comes before the token already makes up so much: it is out. The likeliest one stays, be it never so much.
        is_out_V = sorted_V.cumsum(-1) - sorted_V >= decode.top_p
        is_out_V[0] = False
        scores_V = scores_V.index_fill(0, order_V[is_out_V], -torch.inf)
    return int(torch.multinomial(scores_V.softmax(-1), 1, generator=generator))


def ranked(logits_V: Tensor, token: int, number: int) -> tuple[float, list[tuple[int, float]]]:
    """The token's log probability, and the `number` likeliest tokens with theirs; before temperature and the rest."""
    found_V = logits_V.log_softmax(-1)
    values, ids = found_V.topk(min(number, len(found_V)))
    return float(found_V[token]), list(zip(ids.tolist(), values.tolist(), strict=True))
