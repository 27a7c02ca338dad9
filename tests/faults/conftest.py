"""Slow tests of this folder run by `make faults` only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

import forked
from commands.conftest import write_films
from faults.training import WORDS

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("slow") and not config.getoption("--faults"):
            item.add_marker(pytest.mark.skip(reason="make faults runs it"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that nothing happened to, with its data beside it."""
    home = tmp_path_factory.mktemp("whole")
    write_films(home)
    done = forked.run([*WORDS, "hydra.run.dir=run"], home)
    assert done.returncode == 0, done.stderr
    return home / "run"
