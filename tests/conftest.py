"""What several tests need: the data mirror, a scratch folder to work in, the command line in this process and out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

import forked as forking
from faults.matrix import MATRIX

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A job started in the background ignores Ctrl-C, and so would every command that these tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

Completed = subprocess.CompletedProcess[str]
LONGEST = (
    "test_docs.py",
    "test_packaging.py",
    "commands/test_compare.py",
    "nn/test_product.py",
    "commands/test_chat.py",
    "test_config.py",
    "commands/test_resume.py",
    "commands/test_qlora.py",
)
"""Files that take long, the longest first: begun last, one of them would run alone while the other processes idle."""


@dataclass(frozen=True)
class Answer:
    """What a command line did."""

    code: int
    out: str
    err: str


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-wheel", action="store_true", help="build the wheel and try it in an empty environment")
    parser.addoption("--faults", action="store_true", help="run the fault table's tests and the slow ones: make faults")
    parser.addoption("--kills", type=int, default=100, help="how often the chaos test kills its training")


def pytest_configure(config: pytest.Config) -> None:
    # Tests that do not say how many examples they want: fewer at every change than with all the faults.
    settings.register_profile("quick", max_examples=30)
    settings.load_profile("default" if config.getoption("--faults") else "quick")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    if config.getoption("--faults"):
        kept = [item for item in items if item.get_closest_marker("slow") or _is_of_the_table(item.nodeid)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="make faults runs it"))


def _is_of_the_table(test: str) -> bool:
    return test.partition("[")[0] in {named.partition("[")[0] for row in MATRIX for named in row.tests}


@pytest.fixture(scope="session")
def mirror() -> Path:
    """The local mirror of hub data sets."""
    root = os.environ.get("LORA_HUB_ROOT")
    if not root:
        pytest.skip("LORA_HUB_ROOT is not set: no mirror of the data sets")
    return Path(root)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def lora() -> Callable[..., Completed]:
    """Run the real command line in a new interpreter: lora("train", "lora.r=4", cwd=folder)."""

    def run(*words: str, cwd: Path, stdin: str | None = None, env: dict[str, str] | None = None) -> Completed:
        return subprocess.run(
            [sys.executable, "-m", "lora_cli", *words],
            cwd=cwd,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            env={**os.environ, "COLUMNS": "120", **(env or {})},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def forked() -> Callable[..., Completed]:
    """Run the command line in a process that starts at once: forked("train", "lora.r=4", cwd=folder)."""

    def run(*words: str, cwd: Path, stdin: str = "") -> Completed:
        return forking.run(words, cwd, stdin)

    return run


@pytest.fixture
def call(scratch: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Answer]]:
    """Run the command line in this process, in an empty current directory: call("train", "lora.r=4")."""
    from hydra.core.config_store import ConfigStore

    from lora_cli.cli import main

    def run(*words: str) -> Answer:
        capsys.readouterr()
        code = main(words)
        return Answer(code, *capsys.readouterr())

    yield run
    for group in ("task", "model"):
        ConfigStore.instance().repo.get(group, {}).pop("_run.yaml", None)


@pytest.fixture
def refused(call: Callable[..., Answer], scratch: Path) -> Callable[..., str]:
    """Run a command line that must be refused in one line, with nothing written; returns the line."""

    def run(*words: str) -> str:
        answer = call(*words)
        assert answer.code == 2, answer
        check_refusal(answer.out, answer.err, scratch)
        return answer.err.strip()

    return run


def check_refusal(out: str, err: str, folder: Path) -> None:
    """One line of at most 300 characters on stderr, none on stdout, and no run."""
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert len(err) <= 301, err
    assert "Traceback" not in err
    assert "\x1b" not in err
    assert not (folder / "runs").exists()
