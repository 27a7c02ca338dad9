"""torch.save's files are read as tables of tensors; anything else in them is refused."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.errors import AdapterError
from lora_cli.nn.pickles import read_pickle


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("touched"),)


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    state = {"a": torch.randn(2, 3), "b": torch.nn.Parameter(torch.randn(4).bfloat16())}
    torch.save(state, tmp_path / "a.pt")
    found = read_pickle(tmp_path / "a.pt")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert not any(tensor.requires_grad for tensor in found.values())


FAULTS: dict[str, tuple[Any, str]] = {
    "code": ({"a": Evil()}, "tensors only"),
    "a list": ([torch.zeros(1)], "a table"),
    "empty": ({}, "a table"),
    "nested": ({"a": {"b": torch.zeros(1)}}, "no plain tensor"),
    "a number": ({"a": 3}, "no plain tensor"),
    "whole numbers": ({"a": torch.zeros(2, dtype=torch.long)}, "floats only"),
    "a number for a name": ({1: torch.zeros(2)}, "no name"),
    "a view that claims terabytes": ({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, "larger than the file"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "no plain tensor"),
    "without numbers": ({"a": torch.zeros(2, device="meta")}, "no plain tensor"),
}


@pytest.mark.parametrize(("state", "said"), FAULTS.values(), ids=FAULTS)
def test_anything_else_is_refused(state: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(AdapterError, match=said):
        read_pickle(tmp_path / "a.pt")
    assert not (tmp_path / "touched").exists()


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(AdapterError, match=r"not a file of torch\.save"):
        read_pickle(tmp_path / "a.pt")
    torch.save({"a": torch.zeros(9)}, tmp_path / "b.pt")
    (tmp_path / "b.pt").write_bytes((tmp_path / "b.pt").read_bytes()[:-40])
    with pytest.raises(AdapterError):
        read_pickle(tmp_path / "b.pt")


def test_compressed_data_is_refused_unread(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1 << 16)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as source,
        zipfile.ZipFile(tmp_path / "b.pt", "w", compression=zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    with pytest.raises(AdapterError, match="compressed"):
        read_pickle(tmp_path / "b.pt")


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").symlink_to(tmp_path / "a.pt")
    with pytest.raises(AdapterError, match="not a regular file"):
        read_pickle(tmp_path / "b.pt")
