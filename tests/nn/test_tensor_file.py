"""What a disk refuses is told as such."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lora_cli.nn.tensor_file import save_tensors


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files may have 1,000 bytes at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_the_disk_refuses_is_an_error_of_the_system(small_files: None, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with pytest.raises(OSError, match="File too large") as caught:
        save_tensors({"a": torch.ones(1000)}, file)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(file))


def test_tensors_that_cannot_be_written_are_not_the_disks_fault(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        save_tensors({"a": torch.ones(2, 3).T}, tmp_path / "a.safetensors")
