"""Where a sweep's folder is, by the words that were typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_cli.words import sweep_folder

WORDS = ["-m", "lora.r=2,4", "task=sst2", "seed=1,2"]


def folder_of(*words: str, verb: str = "train") -> Path:
    folder, prepared = sweep_folder(verb, words)
    assert folder is not None
    assert f"hydra.sweep.dir={folder.as_posix()}" in prepared
    return folder


def test_the_same_words_have_the_same_folder_and_others_another(scratch: Path) -> None:
    assert folder_of(*WORDS) == folder_of(*WORDS)
    assert folder_of(*WORDS) != folder_of(*WORDS, "train.lr=1")
    assert folder_of(*WORDS).name[10:].startswith("_sweep_r-seed_")


def test_the_day_does_not_matter_once_it_is_there(scratch: Path) -> None:
    name = folder_of(*WORDS).name[10:]
    (scratch / "runs" / f"2020-01-31{name}").mkdir(parents=True)
    assert folder_of(*WORDS) == Path("runs", f"2020-01-31{name}")


@pytest.mark.parametrize("word", ["--multirun", "hydra.launcher.n_jobs=2", "hydra/launcher=basic"])
def test_how_jobs_run_is_not_part_of_it(word: str, scratch: Path) -> None:
    assert folder_of(*WORDS, word) == folder_of(*WORDS)


def test_what_is_trained_again_gets_a_new_folder_which_later_ones_go_on_with(scratch: Path) -> None:
    first = folder_of(*WORDS)
    for number in range(2, 12):
        folder_of(*WORDS).mkdir(parents=True, exist_ok=True)
        assert folder_of(*WORDS, "sweep.redo=all") == Path(f"{first}-{number}")
        Path(f"{first}-{number}").mkdir()
    assert folder_of(*WORDS) == Path(f"{first}-11")


def test_a_folder_of_ones_own_is_taken_and_without_m_there_is_none(scratch: Path) -> None:
    assert folder_of(*WORDS, "hydra.sweep.dir=mine") == Path("mine")
    assert sweep_folder("train", WORDS[1:]) == (None, WORDS[1:])


def test_other_verbs_have_nothing_to_go_on_with(scratch: Path) -> None:
    assert folder_of("-m", "run=a", "task.split=a,b", verb="eval") != folder_of(
        "-m", "run=a", "task.split=a,b", verb="eval"
    )


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["lora.targets=[a],[b,c]", "seed=1"], "targets"),
        (["lora.targets=[a,b]", "seed=1,2"], "seed"),
        (["lora.rank_pattern={a:[1,2],b:3}", "seed=1"], "rankpattern-seed"),
        (["seed=1", "hydra/sweeper=optuna"], "seed"),
        (["+x/y=1,2"], "y"),
        ([], "sweep"),
    ],
)
def test_it_is_named_by_what_is_swept_else_by_what_is_given(words: list[str], name: str, scratch: Path) -> None:
    assert folder_of("-m", *words).name[10:].startswith(f"_sweep_{name}_")
