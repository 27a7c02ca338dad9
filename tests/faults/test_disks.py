"""Checkpoints that are damaged or cut off, and disks that are full, broken or read-only: equal or refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import forked
from commands.conftest import write_films
from faults import harms
from faults.training import WORDS, assert_equal, assert_one_line, resumed

RUN = [*WORDS, "hydra.run.dir=run"]
SYNCS = 7
"""Files of a checkpoint, its folder and the rename: after each of them a kill finds another state."""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_films(tmp_path)
    return tmp_path


def checkpoints(home: Path) -> list[str]:
    return sorted(folder.name for folder in home.glob("run/checkpoints/step-*"))


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[] if n == 2 * SYNCS else pytest.mark.slow) for n in range(1, 3 * SYNCS, 3)]
    + [2 * SYNCS]
)  # fmt: skip
def test_a_kill_while_a_checkpoint_is_written_is_as_if_it_had_not_been(number: int, home: Path, whole: Path) -> None:
    done = forked.run(RUN, home, harm=partial(harms.die_in_save, number))
    assert done.returncode == -9
    resumed(home)
    assert_equal(home / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state.json", "trained", "optimizer", "best", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "deleted"])
def test_a_training_with_a_damaged_checkpoint_goes_on_from_the_one_before(
    name: str, damage: str, home: Path, whole: Path
) -> None:
    shutil.copytree(whole, home / "run")
    facts = json.loads((home / "run/run.json").read_text())
    (home / "run/run.json").write_text(json.dumps(facts | {"status": "running"}))
    (file,) = (home / "run/checkpoints/step-000006").glob(f"{name}*")
    content = file.read_bytes()
    match damage:
        case "truncated":
            file.write_bytes(content[:-2])  # The last byte of a manifest is the end of its line.
        case "flipped":
            file.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
        case "emptied":
            file.write_bytes(b"")
        case "deleted":
            file.unlink()
    assert "from step 4" in resumed(home)
    assert_equal(home / "run", whole)
    assert checkpoints(home) == ["step-000004", "step-000006"]


@pytest.fixture
def disk(home: Path) -> Iterator[Callable[[int], Path]]:
    """disk(1 << 20) gives a folder on a disk of that size, and then makes it so large."""
    folder = home / "disk"
    folder.mkdir()

    def size(num_bytes: int) -> Path:
        again = ["-o", f"{'remount,' if folder.is_mount() else ''}size={num_bytes // 4096 * 4096}"]
        if subprocess.run(["mount", "-t", "tmpfs", *again, "none", str(folder)], capture_output=True).returncode:
            pytest.skip("a small disk cannot be made here: mounting is not allowed")
        return folder

    yield size
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("percent", [5, 15, 40, 70, 90])
def test_a_full_disk_is_told_and_after_room_is_made_the_end_is_the_same(
    percent: int, disk: Callable[[int], Path], home: Path, whole: Path
) -> None:
    needed = sum(file.stat().st_size for file in whole.rglob("*") if file.is_file())
    disk(needed * percent // 100)
    done = forked.run([*WORDS, "hydra.run.dir=disk/run"], home)
    assert done.returncode == 1, done.stderr
    assert_one_line(done.stderr, "No space left on device")
    assert not (home / "disk/run/adapter").exists()
    disk(20 << 20)
    resumed(home, "disk/run")
    assert_equal(home / "disk/run", whole)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (partial(harms.write_small_files, 80_000), "File too large"),
        pytest.param(harms.fail_to_sync, "Input/output error", marks=pytest.mark.slow),
    ],
    ids=["EFBIG", "EIO"],
)
def test_what_a_disk_refuses_is_told_and_later_the_end_is_the_same(
    harm: Callable[[], None], says: str, home: Path, whole: Path
) -> None:
    done = forked.run(RUN, home, harm=harm)
    assert done.returncode == 1, done.stderr
    assert_one_line(done.stderr, says, "step-000002")
    assert json.loads((home / "run/run.json").read_text())["status"] == "failed"
    assert checkpoints(home) == []
    resumed(home)
    assert_equal(home / "run", whole)


def test_a_read_only_folder_is_refused_and_nothing_is_left_in_it() -> None:
    # Under /tmp: what pytest makes, an ordinary user may not enter.
    with TemporaryDirectory() as name:
        home = Path(name)
        write_films(home)
        home.chmod(0o755 if os.geteuid() == 0 else 0o555)
        done = forked.run(RUN, home, harm=harms.lose_rights)
        home.chmod(0o755)
        assert done.returncode == 2, done.stderr
        assert_one_line(done.stderr, "run", "may not be written")
        assert {file.suffix for file in home.iterdir()} == {".csv"}


@pytest.mark.slow
def test_too_little_memory_is_told_with_what_needs_less(home: Path, whole: Path) -> None:
    done = forked.run(
        [*RUN, "train.batch_size=96", "model.random={hidden_size:512}"],
        home,
        harm=partial(harms.have_little_memory, 64),
    )
    assert done.returncode == 1, done.stderr
    assert_one_line(done.stderr, "out of memory", "train.batch_size", "task.max_length")


@pytest.mark.slow
def test_times_of_files_decide_nothing(home: Path, whole: Path) -> None:
    shutil.copytree(whole, home / "run")
    facts = json.loads((home / "run/run.json").read_text())
    (home / "run/run.json").write_text(json.dumps(facts | {"status": "running"}))
    for number, file in enumerate(sorted((home / "run").rglob("*"), reverse=True)):
        os.utime(file, (10**9 + number, 10**9 + number))
    assert "from step 6" in resumed(home)
    assert_equal(home / "run", whole)
