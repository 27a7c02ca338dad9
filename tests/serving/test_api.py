"""The routes over a real connection: what they answer, what OpenAI's client makes of it, and their description."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from lora_cli import load, load_many
from lora_cli.errors import ConfigError, UnknownName
from lora_cli.serving.jobs import Piece, Token
from lora_cli.serving.openai import Reply
from lora_cli.serving.pool import Pool
from lora_cli.serving.schemas import ChatMessage, ChatRequest, CompletionRequest

from .conftest import TEXTS, Served, wait_until


@pytest.fixture(scope="module")
def server(films: Path) -> Iterator[Served]:
    """One server for all tests that leave it as it was."""
    served = Served(_pool(films))
    yield served
    served.stop()


@pytest.fixture(scope="module")
def writer(talks: Path) -> Iterator[Served]:
    served = Served(_pool(talks))
    yield served
    served.stop()


def _pool(folder: Path) -> Pool:
    return load_many([str(folder)], device="cpu", threads=1).pool


def test_texts_are_classified_as_by_the_python_object(server: Served, films: Path) -> None:
    for name in ("a", "two", "dora"):
        found = server.classify(name, *TEXTS)
        wanted = load(str(films / name), device="cpu").predict(TEXTS)
        for place, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
            assert ours["index"] == place
            assert ours["label"] == theirs["label"]
            assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)
    assert server.classify("a", {"text": "aa"}) == server.classify("a", ["aa"]) == server.classify("a", "aa")


def test_the_python_object_answers_each_text_with_its_own_adapter(films: Path, talks: Path) -> None:
    many = load_many([str(films)], device="cpu", threads=1, batch_tokens=20)
    names = ["a", "two", "b", "a", "dora"]
    found = many.predict(TEXTS, names)
    for place, name in enumerate(names):
        (wanted,) = many.predict([TEXTS[place]], name)
        assert found[place]["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)
    written = load_many([str(talks)], device="cpu", threads=1)
    assert written.generate(["hi", "yes"], ["x", "y"]) == [
        written.generate(["hi"], "x")[0],
        written.predict(["yes"], "y")[0]["prediction"],
    ]
    for wrong, model in (("nobody", "nobody"), ("one name for each", ["a"])):
        with pytest.raises(ConfigError, match=wrong):
            many.predict(TEXTS, model)
    with pytest.raises(UnknownName):
        many.predict(TEXTS, "A")
    with pytest.raises(ConfigError, match="write no text"):
        many.generate(TEXTS)


def test_the_package_is_imported_without_torch() -> None:
    code = "import sys, lora_cli; from lora_cli import __version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_models_are_listed_with_what_they_read(server: Served) -> None:
    found = server.get("/v1/models").body["data"]
    assert {model["id"]: model["labels"] for model in found} == {
        **{name: ["bad", "fair", "good"] for name in ("a", "b", "c", "dora")},
        "two": ["no", "yes"],
    }
    assert server.get("/v1/models/two").body == next(model for model in found if model["id"] == "two")
    assert "/" not in json.dumps(found), "no path"


def test_adapters_come_and_go_by_name_while_others_are_served(
    films: Path, tmp_path: Path, serve: Callable[..., Served]
) -> None:
    for name in ("a", "b"):
        shutil.copytree(films / name, tmp_path / "runs" / name)
    server = serve(tmp_path / "runs")
    before = server.classify("b", "aa")
    assert server.ask("DELETE", "/v1/adapters/b").body == {"id": "b", "object": "model", "deleted": True}
    assert server.post("/v1/classify", {"model": "b", "input": "aa"}).status == 404
    assert server.ask("DELETE", "/v1/adapters/b").status == 404
    assert server.post("/v1/adapters", {"name": "b"}).body["id"] == "b"
    assert server.classify("b", "aa") == before
    shutil.copytree(films / "c", tmp_path / "runs" / "new")
    assert server.post("/v1/adapters", {"name": "new"}).status == 200
    assert server.classify("new", "aa")[0]["label"] in ("bad", "fair", "good")
    (tmp_path / "runs" / "new" / "adapter" / "adapter_config.json").write_text("[]")
    answer = server.post("/v1/adapters", {"name": "new"})
    assert answer.status == 422
    assert "/" not in answer.error
    assert server.is_well()


def test_figures_count_what_was_asked(films: Path, serve: Callable[..., Served]) -> None:
    server = serve(films, pool={"max_adapters": 2})
    for name in ("a", "b", "c"):
        server.classify(name, "aa", "zzzz")
    server.post("/v1/classify", {"model": "nobody", "input": "aa"})
    lines = dict(line.rsplit(" ", 1) for line in server.get("/metrics").text.splitlines() if line[0] != "#")
    assert lines['lora_requests_total{code="200",route="/v1/classify"}'] == "3.0"
    assert lines['lora_requests_total{code="404",route="/v1/classify"}'] == "1.0"
    assert lines['lora_rows_total{model="c"}'] == "2.0"
    assert (lines["lora_adapter_loads_total"], lines["lora_adapter_evictions_total"]) == ("3.0", "1.0")
    assert "nobody" not in "".join(lines), "clients make up no names"


def test_the_official_client_is_served_unchanged(writer: Served) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{writer.url}/v1", api_key="none", max_retries=0)
    hello: list[Any] = [{"role": "user", "content": "hi"}]
    assert [model.id for model in client.models.list()] == ["x", "y", "z"]
    assert client.models.retrieve("y").id == "y"
    python = load_many([str(path) for path in [writer.pool.entries["x"].path.parent]], device="cpu", threads=1)

    chat = client.chat.completions.create(model="y", messages=hello)
    assert chat.choices[0].message.content == python.generate(["hi"], "y")[0]
    assert chat.choices[0].finish_reason in ("stop", "length")
    assert chat.usage.completion_tokens <= 12

    settings = {"model": "x", "messages": hello, "temperature": 1.2, "top_p": 0.95, "seed": 4, "max_tokens": 20}
    drawn = client.chat.completions.create(**settings, n=2, logprobs=True, top_logprobs=3)
    assert len({choice.message.content for choice in drawn.choices}) == 2
    assert len(drawn.choices[0].logprobs.content) == 20
    assert len(drawn.choices[0].logprobs.content[0].top_logprobs) == 3

    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == drawn.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == client.chat.completions.create(**settings).usage

    whole = client.completions.create(model="z", prompt=["hi", "yes"], max_tokens=8, temperature=0, logprobs=2)
    assert [choice.text for choice in whole.choices] == python.generate(["hi", "yes"], "z", max_new_tokens=8)
    assert len(whole.choices[1].logprobs.tokens) <= 8
    parts = list(client.completions.create(model="z", prompt="hi", max_tokens=8, temperature=0, stream=True))
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text

    with pytest.raises(openai.NotFoundError, match="no such adapter"):
        client.chat.completions.create(model="nobody", messages=hello)
    with pytest.raises(openai.UnprocessableEntityError, match="512 positions"):
        client.chat.completions.create(model="x", messages=hello, max_tokens=10_000)


def test_a_conversation_goes_on_with_what_the_server_has_said(writer: Served) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{writer.url}/v1", api_key="none", max_retries=0)
    messages: list[Any] = [_turn("hi")]
    first = client.chat.completions.create(model="x", messages=messages).choices[0].message
    for said in (first, first.model_dump()):
        asked = [*messages, said, {"role": "user", "content": [{"type": "text", "text": "and"}]}]
        second = client.chat.completions.create(model="x", messages=asked)
        plain = [*messages, {"role": "assistant", "content": first.content}, _turn("and")]
        assert second.choices == client.chat.completions.create(model="x", messages=plain).choices


def test_parts_of_a_turn_are_its_lines(writer: Served) -> None:
    parts = [{"type": "text", "text": text} for text in ("hi", "there")]
    told = [
        writer.post("/v1/chat/completions", {"model": "y", "messages": [{"role": "user", "content": content}]})
        for content in (parts, "hi\nthere")
    ]
    assert told[0].body["choices"] == told[1].body["choices"]


NEUTRAL = {"tools": [], "logit_bias": {}, "response_format": {"type": "text"}, "store": False, "tool_choice": "none"}


def test_null_is_as_good_as_nothing_and_so_is_what_changes_nothing(writer: Served) -> None:
    talk = {"model": "x", "messages": [_turn("hi")]}
    usual = writer.post("/v1/chat/completions", talk).body["choices"]
    for model, path, body in (
        (ChatRequest, "/v1/chat/completions", talk),
        (CompletionRequest, "/v1/completions", {"model": "x", "prompt": "hi"}),
    ):
        optional = {name: None for name, field in model.model_fields.items() if not field.is_required()}
        assert writer.post(path, {**body, **optional}).status == 200
    assert writer.post("/v1/chat/completions", {**talk, **NEUTRAL}).body["choices"] == usual


def test_an_unforeseen_error_is_told_to_the_servers_side_and_names_no_file(
    films: Path, serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(films)

    def fail() -> bytes:
        raise PermissionError(13, "Permission denied", "/srv/secret")

    monkeypatch.setattr("lora_cli.serving.metrics.Metrics.text", lambda self: fail())
    answer = server.get("/metrics")
    assert (answer.status, answer.error) == (500, "internal error")
    assert "/srv/secret" in "".join(server.warnings)


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"input": []}, "input", "input=[]: List should have at least 1 item, not 0"),
    ({"input": ["aa"] * 300}, "input", "input: List should have at most 256 items, not 300"),
    ({"input": ["aa", 1]}, "input.1", "input.1=1: should be a valid string, or a valid object, or a valid list"),
    ({"input": None}, "input", "input=null: should be a valid string, or a valid list"),
    ({}, "input", "input: it is needed"),
    ({"inputs": "aa"}, "inputs", "inputs: no such field. Did you mean input? There are: model, input"),
    ({"input": [{"txt": "aa"}]}, "input.0", "input.0: no column 'txt'. Did you mean text? There are: text"),
    ({"input": ["aa", {}]}, "input.1", "input.1: without text; this adapter reads text"),
]


@pytest.mark.parametrize(("body", "param", "said"), WRONG, ids=[said for _, _, said in WRONG])
def test_what_is_wrong_is_said_of_the_clients_own_field(
    body: dict[str, Any], param: str, said: str, server: Served
) -> None:
    answer = server.post("/v1/classify", {"model": "a", **body})
    assert (answer.status, answer.error, answer.body["error"]["param"]) == (422, said, param)


def test_config_keys_are_told_by_the_names_that_clients_know(writer: Served) -> None:
    answer = writer.post("/v1/completions", {"model": "x", "prompt": "hi", "max_tokens": 2000})
    assert answer.error.startswith("max_tokens=2000: at most 5")
    talk = {"model": "x", "messages": [_turn("hi")], "max_completion_tokens": 2000}
    assert writer.post("/v1/chat/completions", talk).body["error"]["param"] == "max_completion_tokens"
    answer = writer.post("/v1/completions", {"model": "x", "prompt": "hi", "stop": ["a"] * 5})
    assert answer.error == "stop: List should have at most 4 items, not 5"
    talk = {"model": "x", "messages": [{"role": "assistant", "content": "a"}, _turn("hi")]}
    answer = writer.post("/v1/chat/completions", talk)
    assert answer.error.startswith("messages: the assistant speaks first")
    answer = writer.post("/v1/adapters", {"name": "nobody"})
    assert answer.body["error"]["param"] == "name"


def test_another_method_is_refused_before_another_type(server: Served) -> None:
    assert [server.ask(method, "/v1/classify").status for method in ("PUT", "GET")] == [405, 405]
    assert server.ask("PUT", "/v1/classify", b"a", Content_Type="text/plain").status == 405
    assert [server.ask("HEAD", path).status for path in ("/healthz", "/readyz")] == [200, 200]


def test_offsets_of_tokens_go_on_from_chunk_to_chunk(writer: Served) -> None:
    body = {"model": "x", "prompt": "hi", "max_tokens": 12, "temperature": 0, "logprobs": 2}
    whole = writer.post("/v1/completions", body).body["choices"][0]["logprobs"]
    events = writer.post("/v1/completions", {**body, "stream": True}).text.split("\n\n")[:-2]
    chunks = [json.loads(event[6:])["choices"][0]["logprobs"] for event in events]
    assert len(chunks) > 1
    for name in ("text_offset", "tokens"):
        assert [value for chunk in chunks for value in chunk[name]] == whole[name]


def test_tokens_that_are_parts_of_a_character_are_told_apart_from_text() -> None:
    token = Token("\ufffd", -1.0, (("\ufffd", -1.0), ("a", -1.5), ("\ufffd", -2.0)))
    piece = Piece(0, "\ufffd", (token,), "length", 1, 1)
    completion = Reply(CompletionRequest(model="x", prompt="hi", logprobs=3), 1)
    completion.add(0, piece)
    assert completion.whole()["choices"][0]["logprobs"]["top_logprobs"] == [{"\ufffd": -1.0, "a": -1.5}]
    turn = ChatMessage(role="user", content="hi")
    chat = Reply(ChatRequest(model="x", messages=[turn], logprobs=True, top_logprobs=3), 1)
    chat.add(0, piece)
    (told,) = chat.whole()["choices"][0]["logprobs"]["content"]
    assert [told["bytes"], *(other["bytes"] for other in told["top_logprobs"])] == [None, None, [97], None]


def test_the_description_says_what_is_answered(server: Served) -> None:
    paths = server.get("/openapi.json").body["paths"]
    for path, method, kind in (
        ("/v1/classify", "post", "Classified"),
        ("/v1/completions", "post", "Completion"),
        ("/v1/chat/completions", "post", "ChatCompletion"),
        ("/v1/models", "get", "Adapters"),
        ("/v1/adapters", "post", "Adapter"),
    ):
        answers = paths[path][method]["responses"]
        assert answers["200"]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{kind}")
        assert "405" in answers
    assert list(paths["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]


def test_who_is_still_told_something_when_time_is_up_hears_why_it_ends(
    talks: Path, serve: Callable[..., Served]
) -> None:
    server = serve(talks, grace_s=0.05)
    body = {"model": "x", "prompt": "hi", "max_tokens": 450, "stream": True, "temperature": 2.0, "seed": 1, "n": 16}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read(1)
    started = time.monotonic()
    server.end()
    told = answer.read().decode().rstrip().split("\n\n")
    connection.close()
    assert "the server is stopping" in told[-1]
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/classify", {"model": "x", "input": "hi"}, "writes text"),
        ("/v1/completions", {"model": "x", "prompt": "hi", "tools": []}, "tools"),
        ("/v1/completions", {"model": "x", "prompt": "hi", "frequency_penalty": 0.5}, "frequency_penalty"),
        ("/v1/completions", {"model": "x", "prompt": "hi", "stop": ["a"] * 9}, "stop"),
        ("/v1/chat/completions", {"model": "x", "messages": []}, "messages"),
        ("/v1/chat/completions", {"model": "x", "messages": [{"role": "user", "content": "a"}], "tools": [1]}, "tools"),
        ("/v1/chat/completions", {"model": "x", "messages": [{"role": "assistant", "content": "a"}]}, "last turn"),
        ("/v1/chat/completions", {"model": "x", "messages": [{"role": "root", "content": "a"}]}, "role"),
    ],
)
def test_what_an_adapter_cannot_do_is_refused_by_name(path: str, body: dict[str, Any], said: str, writer: Served):
    answer = writer.post(path, body)
    assert answer.status == 422
    assert said in answer.error


def test_neutral_settings_of_other_clients_are_taken(writer: Served) -> None:
    body = {"model": "x", "prompt": "hi", "frequency_penalty": 0.0, "presence_penalty": 0, "user": "me", "echo": False}
    assert writer.post("/v1/completions", body).status == 200


def test_an_adapter_that_classifies_writes_nothing(server: Served) -> None:
    for path, body in (("completions", {"prompt": "hi"}), ("chat/completions", {"messages": [_turn("hi")]})):
        answer = server.post(f"/v1/{path}", {"model": "a", **body})
        assert (answer.status, "POST /v1/classify" in answer.error) == (422, True)


def _turn(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_its_answer_with_it(stream: bool, writer: Served) -> None:
    # Of so many answers one is long, wherever end marks are drawn.
    body = {"model": "x", "prompt": "hi", "max_tokens": 450, "stream": stream, "temperature": 2.0, "seed": 1, "n": 16}
    before = writer.scheduler.num_steps
    connection = http.client.HTTPConnection("127.0.0.1", writer.port)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    wait_until(lambda: writer.scheduler.num_tokens > 0)
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    wait_until(lambda: writer.scheduler.num_tokens == 0)
    assert writer.scheduler.num_steps - before < 300, "the answer was broken off"


def _naming(case: Any, name: str) -> None:
    """Ask for an adapter that there is, and for a short answer."""
    known = {"model": name, "name": name, "max_tokens": 3, "max_completion_tokens": 3}
    for values in (case.path_parameters, case.body):
        if isinstance(values, dict):
            values.update({key: value for key, value in known.items() if type(values.get(key)) is type(value)})


@pytest.mark.slow
@pytest.mark.parametrize("is_named", [False, True], ids=["names made up", "names that are"])
@pytest.mark.parametrize("kind", ["server", "writer"])
def test_every_route_keeps_to_its_own_description(kind: str, is_named: bool, request: pytest.FixtureRequest) -> None:
    import schemathesis

    served: Served = request.getfixturevalue(kind)
    # Whether an adapter reads a text of that kind, no description says.
    excluded = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")] if is_named else []
    description = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    checked = 0
    for found in description.get_all_operations():
        operation = found.ok()
        if operation.method.upper() == "DELETE":
            continue  # What it takes away, the other tests need.

        @settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            if is_named:
                _naming(case, next(iter(served.pool.entries)))
            case.call_and_validate(excluded_checks=excluded)

        check()
        checked += 1
    assert checked >= 10
    assert served.get("/readyz").status == 200
    assert not served.warnings, "no internal error"
