"""Measured processes end with who measures them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MEASURING = """
import sys
from pathlib import Path
from processes import measure
measure(["-c", "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"], Path(sys.argv[1]), 1)
"""


def waited_for(path: Path) -> int:
    """The number in a file that is being written."""
    for _ in range(300):
        if path.is_file() and (text := path.read_text()):
            return int(text)
        time.sleep(0.1)
    raise AssertionError(path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_is_told_to_end_leaves_no_process_behind(number: int, tmp_path: Path) -> None:
    words = [sys.executable, "-c", MEASURING, str(tmp_path)]
    measuring = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(BENCHMARKS)}, stderr=subprocess.DEVNULL)
    measured = waited_for(tmp_path / "pid")
    measuring.send_signal(number)
    assert measuring.wait(30) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(measured, 0)
