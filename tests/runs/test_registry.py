"""Which run is meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_cli.errors import RunError, UnknownName
from lora_cli.runs.directory import RunDirectory
from lora_cli.runs.registry import find_adapter, find_run, run_of
from runs.test_directory import config


@pytest.fixture
def two_runs(scratch: Path) -> list[RunDirectory]:
    return [RunDirectory.create(config(seed=seed), directory=None, overrides=[]) for seed in (0, 1)]


def test_a_run_is_found_by_path_by_prefix_and_as_latest(two_runs: list[RunDirectory]) -> None:
    two_runs[1].finish()
    assert find_run(str(two_runs[0].path)) == two_runs[0].path
    assert find_run(two_runs[0].path.name[:-2]) == two_runs[0].path
    assert find_run("latest") == two_runs[1].path


def test_a_prefix_that_fits_several_runs_is_refused(two_runs: list[RunDirectory]) -> None:
    with pytest.raises(RunError, match="fits 2 runs"):
        find_run("20")


def test_a_name_without_a_run_suggests_the_nearest(two_runs: list[RunDirectory]) -> None:
    with pytest.raises(UnknownName, match=f"Did you mean {two_runs[0].path.name}"):
        find_run(two_runs[0].path.name + "x")


def test_a_name_in_a_folder_suggests_the_nearest_in_it(scratch: Path) -> None:
    RunDirectory.create(config(), directory=Path("cls/intents"), overrides=[])
    with pytest.raises(
        UnknownName, match=r"^run=cls/intens: no such run. Did you mean cls/intents\? There are: cls/int"
    ):
        find_run("cls/intens")


def test_latest_is_named_only_if_it_is_there(two_runs: list[RunDirectory]) -> None:
    with pytest.raises(UnknownName) as error:
        find_run("latst")
    assert "latest" not in error.value.options
    two_runs[1].finish()
    with pytest.raises(UnknownName, match="Did you mean latest"):
        find_run("latst")


def test_a_run_that_is_being_trained_is_not_to_be_resumed(two_runs: list[RunDirectory]) -> None:
    path = two_runs[0].path
    with two_runs[0].held(), pytest.raises(RunError, match="is being trained and has no adapter yet"):
        find_adapter(str(path))
    with pytest.raises(RunError, match=rf"has no adapter \(status running\); lora resume run={path} finishes it"):
        find_adapter(str(path))


def test_an_empty_folder_is_no_run(scratch: Path) -> None:
    Path("empty").mkdir()
    with pytest.raises(RunError, match="neither a run"):
        find_run("empty")


@pytest.mark.parametrize("name", ["latest", "runs/latest"])
def test_latest_without_a_finished_run_says_what_makes_one(name: str, scratch: Path) -> None:
    with pytest.raises(RunError, match="lora train makes one"):
        find_run(name)


def test_resume_takes_the_newest_run_of_the_same_configuration(two_runs: list[RunDirectory]) -> None:
    again = RunDirectory.create(config(), directory=None, overrides=[])
    assert run_of(config(), None).path == again.path
    assert run_of(config(seed=7), None) is None


def test_resume_into_a_folder_of_another_configuration_names_the_keys(scratch: Path) -> None:
    RunDirectory.create(config(), directory=Path("mine"), overrides=[])
    assert run_of(config(), Path("mine")).path == Path("mine")
    with pytest.raises(RunError, match="differs in seed"):
        run_of(config(seed=5), Path("mine"))
