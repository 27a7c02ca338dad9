"""What is used again in place of a training, and what is set aside."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_cli import reuse
from lora_cli.runs.directory import RunDirectory
from lora_cli.runs.manifest import write_manifest
from lora_cli.spec import ClassificationSpec, TrainRun
from runs.test_leaderboard import make_run


@pytest.fixture
def kept(scratch: Path) -> RunDirectory:
    """A finished run."""
    make_run(Path("kept"), right=0.8)
    write_manifest(Path("kept"))
    return RunDirectory(Path("kept"))


def test_a_whole_run_stays_where_it_is(kept: RunDirectory) -> None:
    (kept.adapter / "notes.txt").write_text("the good one")
    assert reuse.damage(kept) is None
    assert reuse.clear(kept.path) is None
    assert reuse.clear(Path("nothing")) is None
    kept.update(status="interrupted")
    kept.path.joinpath("manifest.json").unlink()
    assert reuse.damage(kept) is None, "it goes on"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("adapter/adapter_model.safetensors", b"", "kept: adapter/adapter_model.safetensors changed since it finished"),
        (
            "adapter/adapter_model.safetensors",
            None,
            "kept: adapter/adapter_model.safetensors missing since it finished",
        ),
        ("predictions/validation.jsonl", None, "kept: predictions/validation.jsonl missing since it finished"),
        ("run.json", b"{", "kept/run.json: not readable as JSON"),
    ],
)
def test_what_is_damaged_makes_room(name: str, content: bytes | None, what: str, kept: RunDirectory) -> None:
    file = kept.path / name
    file.unlink() if content is None else file.write_bytes(content)
    Path("kept.damaged").mkdir()
    why = reuse.damage(kept)
    assert why is not None
    assert why.startswith(what)
    assert reuse.clear(kept.path) == f"{why}; kept as kept.damaged-2, trained anew"
    assert not kept.path.exists()
    assert Path("kept.damaged-2", "config.yaml").exists()


def test_rows_are_read_once_for_all_jobs(kept: RunDirectory, monkeypatch) -> None:
    class Found:
        fingerprint = "f"

    reads: list[int] = []

    def load_rows(task: object, splits: object, *, seed: int) -> dict[str, Found]:
        reads.append(seed)
        return {"validation": Found()}

    monkeypatch.setattr(reuse, "load_rows", load_rows)
    monkeypatch.setattr(reuse, "build_task", lambda spec: None)
    known: reuse.Known = {}
    task = ClassificationSpec(name="films", metrics=["accuracy"])
    assert all(reuse.is_current(kept, TrainRun(task=task, seed=seed), known) for seed in (1, 1, 2))
    assert reads == [1, 2]
