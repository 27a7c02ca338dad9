"""lora serve as a person starts and stops it; what it answers is tested in tests/serving/."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Answer
from forked import Started

from .conftest import Finished


@pytest.fixture(scope="module")
def run(talking: Finished) -> Path:
    return talking.path


def started(*words: str, cwd: Path, harm: Callable[[], object] | None = None) -> tuple[Started, int]:
    """A server in a process of its own, to which `harm` is done first, and its port."""
    server = Started(["serve", *words, "serve.port=0", "device.threads=1"], cwd, harm)
    end = time.monotonic() + 60
    while "\n" not in server.said:
        assert server.returncode is None, server.communicate(1)
        assert time.monotonic() < end
        time.sleep(0.05)
    address = server.said.splitlines()[0]
    assert address.startswith("http://127.0.0.1:")
    return server, int(address.rpartition(":")[2])


def post(port: int, body: dict[str, Any]) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        found = connection.getresponse()
        return found.status, json.loads(found.read())


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_ends_it_after_what_was_begun(number: signal.Signals, code: int, run: Path) -> None:
    server, port = started(f"run={run}", cwd=run.parent)
    body = {"model": run.name, "prompt": "hi", "max_tokens": 300, "temperature": 1.5, "seed": 1}
    found: list[tuple[int, Any]] = []
    asking = threading.Thread(target=lambda: found.append(post(port, body)))
    asking.start()
    metrics = http.client.HTTPConnection("127.0.0.1", port)
    running = ""
    while "lora_running_tokens 0.0" in running or not running:
        metrics.request("GET", "/metrics")
        running = metrics.getresponse().read().decode()
    metrics.close()
    server.send_signal(number)
    out, err = server.communicate(30)
    asking.join()
    assert found[0][0] == 200, "in full"
    assert found[0][1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert server.returncode == code
    assert "Traceback" not in err
    assert len(out.splitlines()) == 1
    waits, last = err.splitlines()[-2:]
    assert re.fullmatch(r"stopping   requests that still run: [12]; they get 10s", waits)
    assert last.startswith("lora serve: ")


def exhausted() -> None:
    """Let the thread that computes end at the first answer."""
    from lora_cli.serving.writing import Writing

    def step(self: Writing) -> bool:
        raise SystemError("the interpreter is at its end")

    Writing.step = step  # type: ignore[method-assign]


def test_it_ends_when_it_can_compute_nothing_any_more(run: Path) -> None:
    server, port = started(f"run={run}", cwd=run.parent, harm=exhausted)
    status, _ = post(port, {"model": run.name, "prompt": "hi"})
    _, err = server.communicate(30)
    assert (status, server.returncode) == (503, 1)
    said = "internal error, nothing can be computed any more: SystemError: the interpreter is at its end"
    assert err.splitlines()[-1] == f"lora serve: {said}"


@pytest.fixture
def tokenless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_SERVE_TOKEN", raising=False)


@pytest.mark.usefixtures("tokenless")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "run: needs a value"),
        (("run=,",), "needs a value"),
        (("run=nothing",), "no such run"),
        (("run=RUN", "serve.host=0.0.0.0"), "needs a token"),
        (("run=RUN", "serve.host="), "serve.host: needs an address"),
        (("run=RUN", "serve.host=no such host"), "serve.host=no such host: leads to no address: "),
        (("run=RUN", "serve.port=70000"), "from 0 to 65535"),
        (("run=RUN", "serve.max_queue=0"), "1 or more"),
        (("run=RUN", "serve.timeout_s=0"), "above 0"),
        (("run=RUN", "serve.token=abc"), "no such key"),
        (("run=RUN", "serve.token_file=none"), "not readable"),
        (("run=RUN", "hydra.run.dir=x"), "makes no folder"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    words: tuple[str, ...], said: str, run: Path, refused: Callable[..., str]
) -> None:
    assert said in refused("serve", *(word.replace("RUN", str(run)) for word in words))


@pytest.mark.parametrize("name", ["fastapi", "uvicorn", "httptools", "prometheus_client"])
def test_a_missing_package_is_told_with_what_to_install(
    name: str, run: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import util

    found = util.find_spec
    monkeypatch.setattr("lora_cli.commands.serve.find_spec", lambda n: None if n == name else found(n), raising=False)
    assert refused("serve", f"run={run}") == "lora serve: needs packages: pip install 'lora-cli[serve]'"


def test_an_address_in_use_is_refused_before_a_model_is_loaded(
    run: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.setattr("lora_cli.models.load_base", lambda *_, **__: sys.exit("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = refused("serve", f"run={run}", f"serve.port={taken.getsockname()[1]}")
    assert "in use" in said


def test_help_names_its_keys(call: Callable[..., Answer]) -> None:
    answer = call("serve", "--help")
    assert answer.code == 0
    assert "serve.max_adapters" in answer.out
    assert "LORA_SERVE_TOKEN" in answer.out
