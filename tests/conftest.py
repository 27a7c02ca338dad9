"""What several tests need: the data mirror, a scratch folder to work in, the real command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

Completed = subprocess.CompletedProcess[str]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-wheel", action="store_true", help="build the wheel and try it in an empty environment")


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
    """Run the real command line in a process of its own: lora("train", "lora.r=4", cwd=folder)."""

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
