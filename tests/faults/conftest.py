"""A training that nothing happens to, for the tests of what happens to others."""

from __future__ import annotations

from pathlib import Path

import pytest

import forked
from commands.conftest import write_films
from faults.training import WORDS


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that nothing happened to, with its data beside it."""
    home = tmp_path_factory.mktemp("whole")
    write_films(home)
    done = forked.run([*WORDS, "hydra.run.dir=run"], home)
    assert done.returncode == 0, done.stderr
    return home / "run"
