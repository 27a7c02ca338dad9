"""What the operating system tells of memory, disks and compilers."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_cli import machine


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """/proc and /sys of a machine of 8 GiB, 6 of them available, without limits."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup/memory").mkdir(parents=True)
    lines = (f"MemTotal: {8 * 2**20} kB", "MemFree: 1 kB", f"MemAvailable: {6 * 2**20} kB", "HugePages_Total: 0")
    (tmp_path / "proc/meminfo").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_memory_is_what_the_kernel_calls_available(root: Path) -> None:
    assert machine.memory(root) == machine.Memory(8 * 2**30, 6 * 2**30)


@pytest.mark.parametrize("file", ["memory.max", "memory/memory.limit_in_bytes"])
def test_a_container_may_have_less(file: str, root: Path) -> None:
    (root / "sys/fs/cgroup" / file).write_text(f"{7 * 2**30}\n")
    assert machine.memory(root) == machine.Memory(7 * 2**30, 6 * 2**30)
    (root / "sys/fs/cgroup" / file).write_text(f"{2**30}\n")
    assert machine.memory(root) == machine.Memory(2**30, 2**30)


@pytest.mark.parametrize(("file", "text"), [("memory.max", "max"), ("memory/memory.limit_in_bytes", f"{2**63 - 4096}")])
def test_no_limit_is_none(file: str, text: str, root: Path) -> None:
    (root / "sys/fs/cgroup" / file).write_text(f"{text}\n")
    assert machine.memory(root).total == 8 * 2**30


def test_room_for_a_folder_that_is_not_there_yet_is_that_of_the_nearest_above(tmp_path: Path) -> None:
    folder, free = machine.free_disk(tmp_path / "runs" / "deep")
    assert folder == tmp_path
    assert free > 0


def test_a_compiler_is_the_one_that_is_named_or_on_the_path(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert machine.compiler() is None
    for name in ("g++", "mine"):
        (tmp_path / name).touch(mode=0o755)
    assert machine.compiler() == str(tmp_path / "g++")
    monkeypatch.setenv("CXX", "mine")
    assert machine.compiler() == str(tmp_path / "mine")
