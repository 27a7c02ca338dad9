"""Clocks inside a measured process: the same ones in ours and in a peer's.

Import it late: it needs torch, and nothing of a process may be left out of its wall time or put in.
"""

from __future__ import annotations

import os
import time
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import GenerationMixin

from processes import STARTED

__all__ = ["watch_generation", "watch_steps"]

PROFILED = (5, 25)
"""Steps between which a profile is taken: the first ones are unlike the others."""
TOP = 10

Notes = dict[str, Any]


def watch_steps(notes: Notes, *, profile: bool = False) -> None:
    """Note `first_step_s`, from the start of the process to the end of the first step, and `step_s`, the median time
    between two ends of steps; with `profile`, `profile`.
    """
    ends: list[float] = []
    steps, profiler = 0, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def stepped(*_: object) -> None:
        nonlocal steps
        steps += 1
        ends.append(time.monotonic())
        if steps == 1:
            notes["first_step_s"] = ends[0] - float(os.environ[STARTED])
        else:
            notes["step_s"] = median(after - before for before, after in pairwise(ends))
        if profile and steps == PROFILED[0]:
            profiler.start()
        if profile and steps == PROFILED[1]:
            profiler.stop()
            notes["profile"] = _top(profiler)

    register_optimizer_step_post_hook(stepped)


def watch_generation(notes: Notes) -> None:
    """Note `tokens` and `tokens_per_s`: what was written, from the first call of generate to the end of the last."""
    generate, started = GenerationMixin.generate, 0.0
    notes["tokens"] = 0

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal started
        started = started or time.perf_counter()
        found = generate(self, *args, **kwargs)
        notes["tokens"] += found.shape[0] * (found.shape[1] - kwargs["input_ids"].shape[1])
        notes["tokens_per_s"] = notes["tokens"] / (time.perf_counter() - started)
        return found

    GenerationMixin.generate = watched


def _top(profiler: Any) -> list[dict[str, Any]]:
    """The operators that took longest by themselves, with their share of all of them."""
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
    whole = sum(row.self_cpu_time_total for row in rows)
    steps = PROFILED[1] - PROFILED[0]
    return [
        {
            "operator": row.key,
            "share": row.self_cpu_time_total / whole,
            "ms_per_step": row.self_cpu_time_total / 1000 / steps,
            "calls_per_step": row.count / steps,
        }
        for row in rows[:TOP]
    ]
