"""A short turn of the fuzzer: whatever bytes a stranger's file holds, it is read or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faults.fuzz import TARGETS, seeds, try_out


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    return folder, seeds(folder)


@settings(max_examples=120, deadline=None)
@given(st.integers(0, len(TARGETS) - 1), st.integers(0, 400), st.binary(max_size=10), st.booleans())
def test_any_bytes_are_read_or_refused(work, target: int, at: int, piece: bytes, whole: bool) -> None:
    folder, good = work
    content = b"" if whole else good[TARGETS[target][0]]
    try_out(target, content[:at] + piece + content[at + len(piece) :], folder, good)


def test_another_error_is_noticed(work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_cli.runs.directory.open_plain", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        try_out(len(TARGETS) - 1, b"a: 1", *work)
