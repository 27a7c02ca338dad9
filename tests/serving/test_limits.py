"""Rows 62 to 70 of the fault table: what a server does not take, and that others are answered meanwhile."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lora_cli.errors import ConfigError
from lora_cli.serving import connections, gate
from lora_cli.serving.models import load_many
from lora_cli.serving.server import is_loopback, open_socket, read_token
from lora_cli.spec import ServeSpec

from .conftest import TEXTS, Served, wait_until

TOKEN = "0123456789abcdef-secret"
NAMES = ["a", "b", "c", "dora", "two"]


@pytest.fixture(scope="module")
def server(films: Path) -> Iterator[Served]:
    served = Served(load_many([str(films)], device="cpu", threads=1).pool, max_text=5000, max_body=20_000)
    yield served
    served.stop()


@pytest.fixture(scope="module")
def writer(talks: Path) -> Iterator[Served]:
    served = Served(load_many([str(talks)], device="cpu", threads=1).pool)
    yield served
    served.stop()


def classify(value: Any) -> bytes:
    return json.dumps({"model": "a", "input": value}).encode()


BODIES = {
    "garbage": b"\x00\xff\xfe{",
    "empty": b"",
    "deep": b"[" * 9000,
    "deep object": b'{"a":' * 3000,
    "a list": b"[]",
    "null": b"null",
    "a number": b"1e999",
    "another type": b'{"model": 1, "input": "aa"}',
    "a text for an object": b'{"model": {"a": 1}, "input": "aa"}',
    "nothing": b'{"model": "a", "input": []}',
    "numbers": classify([1, 2]),
    "null text": classify([None]),
    "lists of lists": classify([[["aa"]]]),
    "another column": classify([{"other": "aa"}]),
    "too many columns": classify([["aa", "bb"]]),
    "NaN": b'{"model": "a", "input": NaN}',
    "an unknown field": b'{"model": "a", "input": "aa", "path": "/etc/passwd"}',
    "not UTF-8": b'{"model": "a", "input": "\xff"}',
    "cut": b'{"model": "a", "inp',
}


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_body_is_refused_and_does_no_harm(name: str, server: Served) -> None:
    answer = server.post("/v1/classify", BODIES[name])
    assert answer.status in (400, 422)
    assert answer.error
    assert len(answer.text) < 600
    assert "Traceback" not in answer.text
    assert server.is_well()
    assert not server.warnings


def test_a_bad_text_fails_alone_among_those_of_its_batch(server: Served) -> None:
    good, bad = classify(TEXTS), classify(["aa", {"other": "zzzz"}])
    with ThreadPoolExecutor(8) as many:
        found = list(many.map(lambda body: server.post("/v1/classify", body), [good, bad] * 6))
    assert [answer.status for answer in found] == [200, 422] * 6
    wanted = server.classify("a", *TEXTS)
    for answer in found[::2]:
        assert [row["label"] for row in answer.body["data"]] == [row["label"] for row in wanted]


@pytest.mark.parametrize(
    "name",
    [
        "nobody",
        "",
        "../a",
        "a/../a",
        "/etc/passwd",
        "a%2fadapter",
        "a\0",
        "latest",
        "a" * 10_000,
        "A",
        " a",
        "a\n",
        "ａ",
    ],
)
def test_only_names_of_the_table_lead_anywhere(name: str, server: Served) -> None:
    for answer in (
        server.post("/v1/classify", {"model": name, "input": "aa"}),
        server.post("/v1/adapters", {"name": name}),
    ):
        assert answer.status == 404
        assert answer.error == "no such adapter; GET /v1/models lists them"


@pytest.mark.parametrize("name", ["..", "%2e%2e", "..%2f..%2fetc", "a%00", "%2fetc%2fpasswd", "x" * 2000])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_only_names_of_the_table_lead_anywhere_in_an_address(method: str, name: str, server: Served) -> None:
    folder = {"GET": "models", "DELETE": "adapters"}[method]
    answer = server.ask(method, f"/v1/{folder}/{name}")
    assert answer.status == 404
    assert "etc" not in answer.error
    assert server.get("/v1/models").body["data"][0]["id"] == "a"


def test_a_head_of_a_megabyte_is_refused(server: Served) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 10) as client:
        client.settimeout(10)
        try:
            client.sendall(b"GET /v1/models/" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
            head = client.recv(100)
        except ConnectionError:
            head = b"HTTP/1.1 431"
    assert head.startswith(b"HTTP/1.1 431")
    assert server.is_well()


@contextlib.contextmanager
def held(server: Served) -> Iterator[None]:
    """Within it the thread that computes has something else to do, so that answers are on their way."""
    hold = threading.Event()
    server.scheduler.call(lambda: hold.wait(20))
    try:
        yield
    finally:
        hold.set()


def test_an_endless_head_is_refused_while_an_answer_is_on_its_way(server: Served) -> None:
    body = classify("aa")
    with held(server), socket.create_connection(("127.0.0.1", server.port), 10) as client:
        client.sendall(_head(len(body)) + body + b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        assert _endless(client) < 16 << 20
    assert server.is_well()


def test_endless_trailers_of_a_body_are_refused(server: Served) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 10) as client:
        client.sendall(_head(None) + b"2\r\n[]\r\n0\r\n")
        assert _endless(client) < 16 << 20
    assert server.is_well()


def test_a_connection_on_which_hundreds_of_requests_wait_is_closed(server: Served) -> None:
    body = classify("aa")
    with held(server), socket.create_connection(("127.0.0.1", server.port), 10) as client:
        client.sendall((_head(len(body)) + body) * 200)
        assert client.recv(100) == b""
    assert server.is_well()


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 400_000, 431),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: evil.example.org\r\n\r\n", 400),
    ],
    ids=["no HTTP", "a long head", "two hosts"],
)
def test_errors_of_the_protocol_are_json_too(sent: bytes, code: int, server: Served) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 10) as client:
        client.sendall(sent)
        answer = http.client.HTTPResponse(client)
        answer.begin()
        error = json.loads(answer.read())["error"]
    assert (answer.status, answer.headers.get_content_type()) == (code, "application/json")
    assert set(error) == {"message", "type", "param", "code"}


def _endless(client: socket.socket) -> int:
    """Bytes of headers that were sent until nobody took any; what the kernel keeps on both sides is among them."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < 32 << 20:
            client.sendall(b"A: " + b"a" * 8000 + b"\r\n")
            sent += 8005
    return sent


def _head(length: int | None) -> bytes:
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    kind = "Content-Type: application/json"
    return f"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\n{kind}\r\n{size}\r\n\r\n".encode()


def test_an_adapter_removed_while_it_is_loaded_harms_no_other(
    films: Path, tmp_path: Path, serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        shutil.copytree(films / name, tmp_path / "runs" / name)
    server = serve(tmp_path / "runs")
    add = type(server.pool.bank).add

    def add_late(bank: Any, key: str, source: Any, **settings: Any) -> Any:
        if key.startswith("b@"):
            shutil.rmtree(tmp_path / "runs" / "b")
        return add(bank, key, source, **settings)

    monkeypatch.setattr(type(server.pool.bank), "add", add_late)
    with ThreadPoolExecutor(8) as many:
        bodies = [{"model": "ab"[number % 2], "input": "aa"} for number in range(16)]
        found = list(many.map(lambda body: server.post("/v1/classify", body), bodies))
    assert {answer.status for answer in found[::2]} == {200}
    assert {answer.status for answer in found[1::2]} == {500}
    assert {answer.headers["Retry-After"] for answer in found[1::2]} == {None}, "again would be no better"
    assert {answer.error for answer in found[1::2]} == {"the adapter b cannot be loaded"}
    assert "adapter_model.safetensors" in server.warnings[0], "the server's side is told where"


def test_too_many_waiting_texts_are_sent_away(films: Path, serve: Callable[..., Served]) -> None:
    server = serve(films, max_queue=4, batch_tokens=8)
    hold = threading.Event()
    server.scheduler.call(hold.wait)
    with ThreadPoolExecutor(20) as many:
        asked = [many.submit(server.post, "/v1/classify", {"model": "a", "input": "aa"}) for _ in range(20)]
        wait_until(lambda: sum(each.done() for each in asked) == 16)
        hold.set()
        found = [each.result() for each in asked]
    assert sorted(answer.status for answer in found) == [200] * 4 + [429] * 16
    late = next(answer for answer in found if answer.status == 429)
    assert late.headers["Retry-After"] == "1"
    assert server.is_well()


@pytest.mark.slow
def test_a_thousand_requests_at_200_at_a_time_are_answered_as_single_ones(
    films: Path, serve: Callable[..., Served]
) -> None:
    import psutil

    server = serve(films, pool={"max_adapters": 3, "threads": 2}, max_queue=150, timeout_s=60.0)
    single = {(name, text): server.classify(name, text)[0] for name in NAMES for text in TEXTS}
    asked = [(NAMES[number % 5], TEXTS[number % 7 % 5]) for number in range(1000)]

    def ask(pair: tuple[str, str]) -> Any:
        return server.post("/v1/classify", {"model": pair[0], "input": pair[1]})

    memory = []
    with ThreadPoolExecutor(200) as many:
        for _ in range(2):
            found = list(many.map(ask, asked))
            memory.append(psutil.Process().memory_info().rss)
    counts = {status: sum(answer.status == status for answer in found) for status in (200, 429, 503)}
    assert sum(counts.values()) == 1000
    assert counts[200] > 300
    for pair, answer in zip(asked, found, strict=True):
        if answer.status == 200:
            ours, theirs = answer.body["data"][0], single[pair]
            assert ours["label"] == theirs["label"]
            assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)
    assert memory[1] - memory[0] < 100 << 20, "the second thousand takes no more memory"
    assert len(server.pool.bank.names) <= 3


def test_slow_clients_do_not_keep_others_waiting(
    films: Path, serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_HEAD_S", 1.0)
    monkeypatch.setattr(gate, "_BODY_S", 1.0)
    server = serve(films)
    head = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(64)]
    for number, client in enumerate(slow):
        client.sendall([b"", b"POST /v1/cl", head, head + b"Content-Length: 100\r\n\r\n{"][number % 4])
    started = time.monotonic()
    assert server.is_well()
    assert time.monotonic() - started < 5
    for number, client in enumerate(slow):
        client.settimeout(10)
        answer = client.recv(100)
        assert answer.startswith(b"HTTP/1.1 408") if number % 4 == 3 else answer == b""
        client.close()


def test_more_connections_than_allowed_are_sent_away(films: Path, serve: Callable[..., Served]) -> None:
    server = serve(films, max_connections=4)
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
    wait_until(lambda: server.ask("GET", "/healthz").status == 503)
    assert "too many connections" in server.get("/healthz").error
    for client in idle:
        client.close()
    wait_until(lambda: server.ask("GET", "/healthz").status == 200)


@pytest.mark.parametrize("length", ["1000000000000", "20001", "-5", "abc", "1" * 400])
def test_a_length_that_is_too_large_or_none_is_refused_before_a_byte_is_read(length: str, server: Served) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 10) as client:
        client.sendall(
            b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {length}\r\n\r\n{{".encode()
        )
        status = int(client.recv(100).split()[1])
    assert status == (413 if length.isdigit() and len(length) < 20 else 400)
    assert server.is_well()


def test_a_body_without_a_length_is_cut_off_where_it_is_too_large(server: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    chunks = (b'"' + b"a" * 5000 for _ in range(100))
    headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    try:
        connection.request("POST", "/v1/classify", chunks, headers, encode_chunked=True)
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # It was closed before all was sent.
    connection.close()
    assert server.is_well()


@pytest.mark.parametrize("text", ["mm " * 1500, "\x00\x1b[2J\u202e\ud800", "", " ", "é" * 2000], ids=repr)
def test_odd_texts_are_classified(text: str, server: Served) -> None:
    assert server.post("/v1/classify", classify(text)).body["data"][0]["label"] in ("bad", "fair", "good")


def test_too_long_a_text_is_refused(server: Served, writer: Served) -> None:
    for body in (classify("a" * 5001), classify(["a" * 2000] * 3), classify([{"text": "a" * 6000}])):
        answer = server.post("/v1/classify", body)
        assert (answer.status, "5,000 characters" in answer.error) == (413, True)
    long = {"model": "x", "messages": [{"role": "user", "content": "a" * 60_000}] * 2}
    assert writer.post("/v1/chat/completions", long).status == 413
    # What is longer than the model reads is cut, as in training.
    cut = writer.post("/v1/completions", {"model": "x", "prompt": "a" * 60_000, "max_tokens": 2})
    assert cut.body["usage"]["prompt_tokens"] < 512


NUMBERS = [("max_tokens", value) for value in (0, -1, 1e9, 1.5, "5", True)]
NUMBERS += [("temperature", value) for value in (-0.1, 2.1, 1e9, "1")]
NUMBERS += [("top_p", value) for value in (0, -1, 1.1)] + [("n", value) for value in (0, 1000, -1)]
NUMBERS += [("seed", value) for value in (-1, 2**70)] + [("logprobs", 6), ("logprobs", -1), ("stop", [""])]


@pytest.mark.parametrize(("key", "value"), NUMBERS, ids=str)
def test_a_number_out_of_range_is_refused_by_its_name(key: str, value: Any, writer: Served) -> None:
    answer = writer.post("/v1/completions", {"model": "x", "prompt": "hi", key: value})
    assert answer.status == 422
    assert answer.error.startswith(key)
    assert answer.body["error"]["param"].partition(".")[0] == key


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_number_is_refused(number: str, writer: Served) -> None:
    body = f'{{"model": "x", "prompt": "hi", "temperature": {number}}}'.encode()
    assert writer.post("/v1/completions", body).status in (400, 422)


def test_an_answer_that_takes_too_long_is_given_up(talks: Path, serve: Callable[..., Served]) -> None:
    server = serve(talks, timeout_s=0.5)
    hold = threading.Event()
    server.scheduler.call(lambda: hold.wait(5))
    started = time.monotonic()
    answer = server.post("/v1/completions", {"model": "x", "prompt": "hi"})
    assert answer.status == 503
    assert time.monotonic() - started < 4
    hold.set()
    wait_until(lambda: server.scheduler.num_tokens == 0)
    assert server.post("/v1/completions", {"model": "x", "prompt": "hi", "max_tokens": 1}).status == 200


def test_a_token_is_needed_wherever_anything_is_told_or_done(films: Path, serve: Callable[..., Served]) -> None:
    server = serve(films, token=TOKEN)
    for path in ("/healthz", "/readyz", "/", "/docs"):
        assert server.get(path).status == 200
    assert "dora" not in server.get("/").text + server.get("/docs").text, "pages name no adapter"
    paths = ["/openapi.json", "/metrics", "/v1/models", "/nothing", "/HEALTHZ", "//healthz"]
    wrong = [
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Basic {TOKEN}",
        TOKEN,
        "Bearer \xe9",
    ]
    for path in paths:
        answer = server.get(path)
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert TOKEN not in answer.text
    for given in (*wrong, "Bearer \xe9"):
        answer = server.post("/v1/classify", {"model": "a", "input": "aa"}, Authorization=given)
        assert answer.status == 401
    for scheme in ("Bearer", "bearer"):
        right = {"Authorization": f"{scheme} {TOKEN}", "Host": "adapters.example.org"}
        assert server.post("/v1/classify", {"model": "a", "input": "aa"}, **right).status == 200
    description = server.get("/openapi.json", **right).body
    assert description["components"]["securitySchemes"] == {"token": {"type": "http", "scheme": "bearer"}}
    assert description["security"] == [{"token": []}]
    assert description["paths"]["/healthz"]["get"]["security"] == []


def test_other_sites_may_not_ask_by_the_users_browser(server: Served) -> None:
    assert server.get("/v1/models", Host="evil.example.org").status == 403
    assert server.get("/v1/models", Host=f"evil.example.org:{server.port}").status == 403
    for host in (f"localhost:{server.port}", "127.0.0.1", f"[::1]:{server.port}"):
        assert server.get("/v1/models", Host=host).status == 200
    # What a form can send without asking for leave.
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert server.post("/v1/classify", classify("aa"), Content_Type=kind).status == 415
    found = server.post("/v1/classify", classify("aa"), Origin="https://evil.example.org")
    assert "Access-Control-Allow-Origin" not in found.headers


def test_it_listens_to_this_machine_only_unless_asked_and_then_with_a_token() -> None:
    assert is_loopback(ServeSpec().host)
    assert [is_loopback(host) for host in ("127.8.8.8", "::1", "localhost", "0.0.0.0", "::", "10.0.0.1", "a.b")] == [
        *[True] * 3,
        *[False] * 4,
    ]
    for host in ("0.0.0.0", "::", "192.168.0.1"):
        with pytest.raises(ConfigError, match="needs a token"):
            open_socket(ServeSpec(host=host, port=0), None)
    with open_socket(ServeSpec(host="0.0.0.0", port=0), TOKEN) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match="in use"):
            open_socket(ServeSpec(port=port), None)


def test_a_token_comes_from_a_file_of_ones_own_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    spec = ServeSpec(token_file=str(file))
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_token(spec)
    file.chmod(0o600)
    assert read_token(spec) == TOKEN
    file.write_text("short")
    with pytest.raises(ConfigError, match="16 printable"):
        read_token(spec)
    with pytest.raises(ConfigError, match="not readable"):
        read_token(ServeSpec(token_file=str(tmp_path / "none")))
    assert read_token(ServeSpec()) is None
    monkeypatch.setenv("LORA_SERVE_TOKEN", TOKEN)
    assert read_token(ServeSpec()) == TOKEN
    monkeypatch.setenv("LORA_SERVE_TOKEN", "")
    with pytest.raises(ConfigError, match="16 printable"):
        read_token(ServeSpec())
