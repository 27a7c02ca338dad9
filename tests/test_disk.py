"""Whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lora_cli.disk import atomic_file, atomic_folder, defused, read_object, remove_strays, shown, unless_empty
from lora_cli.errors import RunError


def test_a_file_half_written_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    with atomic_file(target) as temporary:
        temporary.write_text("old")

    def fail() -> None:
        with atomic_file(target) as temporary:
            temporary.write_text("ne")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        fail()
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_a_file_that_cannot_be_written_is_told_by_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"report\.html") as refusal, atomic_file(tmp_path / "report.html") as temporary:
        raise OSError(errno.EROFS, "Read-only file system", str(temporary))
    assert refusal.value.filename == str(tmp_path / "report.html")


def test_a_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with atomic_folder(tmp_path / "x") as temporary:
            (temporary / name).touch()
    assert [file.name for file in tmp_path.rglob("*")] == ["x", "b"]


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1, "a": 2}', '{"a": NaN}', '{"a": Infinity}', "\xff", "{" * 9999])
def test_json_that_is_no_plain_object_is_refused_with_the_callers_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"a\.json"):
        read_object(tmp_path / "a.json", RunError, limit=1 << 20)


def test_a_long_path_keeps_its_end() -> None:
    assert shown("a" * 200 + "/\x1bb.csv").endswith("a/\\x1bb.csv")
    assert len(shown("a" * 200)) == 90


@pytest.mark.parametrize(("name", "stays"), [("own", False), ("other", True)])
def test_a_folder_without_results_is_taken_away(name: str, stays: bool, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x"
    with unless_empty(folder, besides="own"):
        (folder / "0").mkdir(parents=True)
        (folder / name).touch()
    assert folder.exists() == (tmp_path / "runs").exists() == stays


def test_names_survive_a_power_cut_only_after_their_content_has(tmp_path: Path, monkeypatch) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(handle: int) -> None:
        done.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        fsync(handle)

    def noted_rename(path: Path, target: Path) -> Path:
        done.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    with atomic_folder(tmp_path / "x") as temporary:
        (temporary / "a").touch()
    inside = str(temporary)
    assert done == [f"{inside}/a", inside, "rename", str(tmp_path)]


def test_what_killed_writers_left_is_taken_away_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.1.tmp", ".b.2.old", "c.tmp", ".lock"):
        (tmp_path / name).touch()
    (tmp_path / ".step.1.tmp").mkdir()
    (tmp_path / ".step.1.tmp" / "state.json").touch()
    (tmp_path / ".link.1.tmp").symlink_to(tmp_path)
    (tmp_path / ".editor.tmp").touch()
    remove_strays(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".editor.tmp", ".lock", "c.tmp"], "what is not ours"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx", "\rx", "\0x"])
def test_a_formula_is_defused_for_a_table_and_a_number_is_left_alone(text: str) -> None:
    assert defused(text) == f"'{text}"
    assert [defused(value) for value in (-1.5, None, "a=1", "")] == [-1.5, None, "a=1", ""]
