"""A few runs on one base, and a server in a thread of this process."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands.conftest import FILMS, MODEL, write_films
from conftest import Completed
from lora_cli.engine.device import open_device
from lora_cli.runs.manifest import write_manifest
from lora_cli.serving.adapters import Shelf
from lora_cli.serving.api import build_app
from lora_cli.serving.pool import Pool
from lora_cli.serving.scheduler import Scheduler
from lora_cli.serving.server import Ending, allowed_hosts, build_server, open_socket
from lora_cli.spec import DeviceSpec, ServeSpec

TEXTS = ["mmmmmm", "zzzz and aa, which is longer than the others are", "aa", "zzzz", "a b c"]
SHORT = ("train.max_steps=2", "train.batch_size=8", "device.threads=1", "train.init_seed=0")


def move(run: Path, seed: int, size: float = 0.2) -> None:
    """Give the adapter of a run other weights, as far from the base as training would."""
    file, draw = run / "adapter" / "adapter_model.safetensors", torch.Generator().manual_seed(seed)
    # What is zero belongs to a part of a fused layer that is not adapted.
    tensors = {key: x + size * torch.randn(x.shape, generator=draw) * (x != 0) for key, x in load_file(file).items()}
    # As a run saves it: in a file of its own that takes the place of the old one.
    save_file(tensors, f"{file}.new", metadata={"format": "pt"})
    Path(f"{file}.new").replace(file)
    write_manifest(run)


def copies(run: Path, *names: str, size: float = 0.2) -> None:
    """Runs beside `run`, each with weights of its own."""
    for seed, name in enumerate(names):
        shutil.copytree(run, run.parent / name)
        move(run.parent / name, seed, size)


def train(forked: Callable[..., Completed], home: Path, name: str, *words: str) -> Path:
    done = forked("train", *SHORT, *words, f"hydra.run.dir={name}", cwd=home)
    assert done.returncode == 0, done.stderr
    return home / name


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory, forked: Callable[..., Completed]) -> Path:
    """A folder of runs that classify: a, b and c have three labels, dora is of another variant, two has two labels."""
    home = tmp_path_factory.mktemp("films")
    write_films(home)
    (home / "two.csv").write_text("text,verdict\n" + "aa,no\nzzzz,yes\n" * 8)
    words = (*MODEL, "task=text_classification", "task.label=verdict", "lora.targets=[all-linear]")
    copies(train(forked, home, "runs/a", *words, *FILMS, "lora.r=4"), "b", "c")
    move(home / "runs" / "a", 7)
    move(train(forked, home, "runs/dora", *words, *FILMS, "lora=dora"), 8, 0.05)
    two = ("task.data.train=two.csv", "task.data.validation=two.csv")
    move(train(forked, home, "runs/two", *words, *two, "lora.targets=[query]"), 9)
    return home / "runs"


@pytest.fixture(scope="session")
def talks(tmp_path_factory: pytest.TempPathFactory, forked: Callable[..., Completed]) -> Path:
    """A folder of runs x, y and z that converse."""
    home = tmp_path_factory.mktemp("talks")
    turns = [{"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "hello"))]
    (home / "chat.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 20)
    words = ("task=chat", "task.template=plain", "model=tiny-llama", "task.data.train=chat.jsonl")
    run = train(forked, home, "runs/x", *words, "lora.targets=[all-linear]", "task.decode.max_new_tokens=12")
    copies(run, "y", "z", size=0.5)
    move(run, 7, 0.5)
    return home / "runs"


@pytest.fixture
def pool_of() -> Iterator[Callable[..., Pool]]:
    """pool_of(films, max_adapters=2): a pool of the runs in a folder, or of those that are named."""
    before = torch.get_num_threads()

    def make(*runs: Path, threads: int = 1, **settings: Any) -> Pool:
        shelf = Shelf([str(run) for run in runs])
        return Pool(shelf, open_device(DeviceSpec(name="cpu", threads=threads)), **settings)

    yield make
    torch.set_num_threads(before)


@dataclass
class Answer:
    status: int
    body: Any
    headers: http.client.HTTPMessage
    text: str

    @property
    def error(self) -> str:
        """What an answer that is none says; that it is one."""
        assert set(self.body) == {"error"}
        assert set(self.body["error"]) == {"message", "type", "param", "code"}
        return str(self.body["error"]["message"])


class Served:
    """A server in a thread, and a client."""

    def __init__(self, pool: Pool, *, token: str | None = None, **settings: Any) -> None:
        self.spec = ServeSpec(**{"port": 0, "timeout_s": 20.0, "grace_s": 2.0} | settings)
        self.pool, self.warnings = pool, list[str]()
        pool.warn = self.warnings.append
        self.scheduler = Scheduler(pool, batch_tokens=self.spec.batch_tokens, max_queue=self.spec.max_queue)
        hosts = allowed_hosts(self.spec, token)
        app = build_app(self.scheduler, self.spec, token=token, hosts=hosts, warn=self.warnings.append)
        self._socket = open_socket(self.spec, token)
        self.port = self._socket.getsockname()[1]
        self._server = build_server(app, self.spec, Ending(lambda: self.scheduler.stop(0.0)))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def end(self) -> None:
        """As a signal does."""
        self._server.should_exit = True

    def stop(self) -> None:
        self.end()
        self._thread.join(20)
        assert not self._thread.is_alive()
        self._socket.close()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """`body` is JSON, or, as bytes, what it is."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"} if data is not None else {}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, data, {**kind, **named})
            found = connection.getresponse()
            text = found.read().decode()
        is_json = found.headers.get_content_type() == "application/json"
        return Answer(found.status, json.loads(text) if is_json and text else None, found.headers, text)

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.ask("POST", path, body, **headers)

    def classify(self, model: str, *texts: Any) -> list[dict[str, Any]]:
        answer = self.post("/v1/classify", {"model": model, "input": list(texts)})
        assert answer.status == 200, answer.text
        return list(answer.body["data"])

    def is_well(self) -> bool:
        """Whether it still answers as it should."""
        return self.get("/readyz").status == 200 and self.classify("a", "aa")[0]["label"] in ("bad", "fair", "good")


@pytest.fixture
def serve(pool_of: Callable[..., Pool]) -> Iterator[Callable[..., Served]]:
    """serve(films, max_body=100): a server of the runs in a folder, until the test ends."""
    running: list[Served] = []

    def start(*runs: Path, pool: dict[str, Any] | None = None, **settings: Any) -> Served:
        running.append(Served(pool_of(*runs, **(pool or {})), **settings))
        return running[-1]

    yield start
    for each in running:
        each.stop()


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
