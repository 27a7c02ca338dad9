"""kill -9 at any time, again and again."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.chaos import chaos


@pytest.mark.slow
def test_a_training_killed_again_and_again_ends_as_one_left_alone(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kills = request.config.getoption("--kills")
    found = chaos(tmp_path, kills)
    assert found.differ == ()
    assert found.kills >= 0.8 * kills, "it ended too early to be killed as often as asked for"
    print(found)
