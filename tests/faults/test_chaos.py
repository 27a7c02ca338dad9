"""kill -9 at any time, again and again."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.chaos import chaos


@pytest.mark.slow
def test_a_training_killed_again_and_again_ends_as_one_left_alone(
    tmp_path: Path, request: pytest.FixtureRequest, record_property
) -> None:
    kills = request.config.getoption("--kills")
    found = chaos(tmp_path, kills)
    assert found.differ == ()
    assert found.kills >= 0.8 * kills, "it ended too early to be killed as often as asked for"
    cost = f"{found.whole_s:.0f} s undisturbed, {found.lost_s:.2f} s lost per kill"
    record_property("chaos", f"{found.kills} kills, {found.steps_again} of {found.steps} steps done again, {cost}")
