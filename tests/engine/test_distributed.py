"""Who does what: every row of a step, and every batch of a split, by one process and no more."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.engine.distributed import ALONE, World

WINDOWS = st.lists(st.integers(1, 6), min_size=1, max_size=6)


def window_of(sizes: list[int]) -> list[list[int]]:
    numbers = iter(range(sum(sizes)))
    return [[next(numbers) for _ in range(size)] for size in sizes]


@given(sizes=WINDOWS, size=st.integers(1, 5), missing=st.integers(0, 5), is_sharded=st.booleans())
def test_every_row_of_a_step_is_done_once(sizes, size, missing, is_sharded) -> None:
    window = window_of(sizes)
    worlds = [World(rank, size, is_sharded) for rank in range(size)]
    parts = [world.of_step(window, len(window) + missing) for world in worlds]
    done = Counter(row for part in parts for share in part if share.counts for row in share.rows)
    assert done == Counter(range(sum(sizes)))
    if is_sharded:
        assert len({len(part) for part in parts}) == 1, "all compute as often as any one does"


@given(sizes=WINDOWS, size=st.integers(1, 5))
def test_micro_batches_that_can_be_shared_out_keep_their_rows_and_their_dropout(sizes, size) -> None:
    window = window_of(sizes)
    alone = {share.seed: share.rows for share in ALONE.of_step(window, size * 3)}
    parts = [World(rank, size).of_step(window, size * 3) for rank in range(size)]
    assert {share.seed: share.rows for part in parts for share in part} == alone


@given(sizes=WINDOWS, size=st.integers(2, 5))
def test_parts_of_one_micro_batch_draw_their_own_dropout(sizes, size) -> None:
    parts = [World(rank, size).of_step(window_of(sizes), size * 3 + 1) for rank in range(size)]
    seeds = [share.seed for part in parts for share in part]
    assert len(seeds) == len(set(seeds))


@given(number=st.integers(0, 20), size=st.integers(1, 5), is_sharded=st.booleans())
def test_every_batch_of_a_split_is_done_once(number, size, is_sharded) -> None:
    parts = [list(World(rank, size, is_sharded).own(range(number))) for rank in range(size)]
    assert sorted(item for part in parts for item, counts in part if counts) == list(range(number))
    if is_sharded:
        assert len({len(part) for part in parts}) == 1, "all compute as often as any one does"


def test_one_process_has_nobody_to_ask() -> None:
    loss, parameter = torch.ones(()), torch.nn.Parameter(torch.ones(2))
    assert ALONE.add_up([parameter], loss) is loss
    assert parameter.grad is None
    assert ALONE.gathered("x") == ["x"]
    assert ALONE.from_first("x") == "x"
    assert ALONE.sums(1.5, True, device=torch.device("cpu")) == [1.5, 1]
    ALONE.agree({"w": parameter})


_SHARDED = """
import torch
from torch.distributed.tensor import DTensor
from lora_cli.engine.distributed import join, leave
from lora_cli.engine.offload import move_whole
from lora_cli.nn import inject
from lora_cli.spec import LoraSpec
from nn.models import tiny_lm, trained

CPU = torch.device("cpu")
IDS = torch.arange(5, 65).view(4, 15)
world = join(CPU, shard=True)

def learnt(how):
    model = tiny_lm("llama", vocab_size=100)
    if how:
        world.share_out(model, (), CPU, offload=how == "offload")
        move_whole(model, CPU)
    inject(model, LoraSpec(r=2, targets=["all-linear"]), groups={}, skip=("lm_head",), seed=0)
    trained(model)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(isinstance(p, DTensor) for p in frozen) == bool(how)
    loss = model(input_ids=IDS).logits.square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]

whole = learnt("")
for how in ("split", "offload"):
    torch.testing.assert_close(learnt(how), whole, rtol=1e-6, atol=1e-6)
leave()
"""


def test_split_weights_give_the_gradients_of_whole_ones_wherever_they_wait(tmp_path: Path) -> None:
    """On a CPU they wait where they are computed, but go the way of those that do not."""
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    common = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LORA_MEETING": str(tmp_path / "meeting")}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", _SHARDED],
            env={**common, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in both:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
