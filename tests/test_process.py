"""How a process starts, speaks and ends."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from lora_cli.process import hurry, settle_down


def ended(code: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    words = [sys.executable, "-c", f"from lora_cli.process import leave, say_anything\n{code}"]
    return subprocess.run(words, capture_output=True, timeout=60, check=False, env={"PATH": "/usr/bin:/bin"} | env)


def test_the_collector_is_as_before_once_everything_is_there_and_leaves_that_alone() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    hurry()
    assert gc.get_threshold()[0] > 100 * before[0]
    settle_down()
    try:
        assert gc.get_threshold() == before
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
    settle_down()
    assert gc.get_freeze_count() == 0, "a program that uses the library is not meddled with"


def test_a_process_that_leaves_has_written_everything_and_done_what_was_left_for_the_end() -> None:
    code = "import atexit, sys\natexit.register(lambda: print('bye'))\n"
    done = ended(code + "print('out', end='')\nsys.stderr.write('err')\nleave(3)")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"outbye\n", b"err")


def test_ctrl_c_before_the_command_has_begun_says_nothing() -> None:
    code = "import lora_cli.process as process\ndef harm(): raise KeyboardInterrupt\nprocess.hurry = harm\n"
    done = ended(code + "from lora_cli.__main__ import start\nstart()")
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_it_waits_for_threads_that_are_not_to_be_cut_off() -> None:
    code = "import threading, time\ndef work():\n  time.sleep(0.3); print('done')\n"
    done = ended(code + "threading.Thread(target=work).start()\nleave(0)")
    assert (done.returncode, done.stdout) == (0, b"done\n")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_what_a_terminal_cannot_show_is_written_as_an_escape(stream: str) -> None:
    code = f"import sys\nsay_anything()\nsys.{stream}.write('caf\\u00e9 \\u2192')\nleave(0)"
    done = ended(code, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0
    assert getattr(done, stream) == b"caf\\xe9 \\u2192"
