"""What is rehearsed before the first step."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from lora_cli.engine import evaluate as evaluating
from lora_cli.engine.evaluate import rehearse

MIB = 2**20


@dataclass(frozen=True)
class Text:
    num_tokens: int


@dataclass
class Machine:
    """A device whose scorings take 10 MiB a row."""

    kind: str = "cpu"
    size: int = 1
    scored: list[list[int]] = field(default_factory=list)

    @property
    def device(self) -> Any:
        return SimpleNamespace(type=self.kind)

    @property
    def world(self) -> Any:
        return SimpleNamespace(size=self.size)

    def resident_memory(self) -> int:
        return 500 * MIB

    def peak_memory_mib(self) -> float:
        return 500 + 10 * max(map(len, self.scored))


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch):
    """rehearsed(machine, available MiB): how many rows are scored at a time, of a batch of 32 of 40 rows."""
    monkeypatch.setattr(
        evaluating,
        "evaluate",
        lambda model, task, examples, *, device, batch_size: device.scored.append([e.num_tokens for e in examples]),
    )

    def run(device: Machine, available: int) -> list[int]:
        monkeypatch.setattr(evaluating.machine, "memory", lambda: SimpleNamespace(available=available * MIB))
        rehearse(None, None, [Text(n) for n in range(1, 41)], device=device, batch_size=32)  # type: ignore[arg-type]
        assert all(rows == sorted(range(41 - len(rows), 41), reverse=True) for rows in device.scored), "the longest"
        return [len(rows) for rows in device.scored]

    return run


def test_a_few_rows_are_enough_where_memory_is_plentiful(rehearsed) -> None:
    assert rehearsed(Machine(), 3201) == [8]


def test_all_rows_of_the_batch_follow_where_they_might_be_too_many(rehearsed) -> None:
    assert rehearsed(Machine(), 3199) == [8, 32]


@pytest.mark.parametrize("machine", [Machine(kind="cuda"), Machine(size=2)])
def test_a_gpu_and_several_processes_score_all_rows_at_once(machine: Machine, rehearsed) -> None:
    assert rehearsed(machine, 10**6) == [32]
