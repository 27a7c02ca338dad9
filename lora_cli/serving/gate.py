"""What stands before every route: who may ask, how large a request may be and how long it may take. Knows ASGI; nothing
of adapters.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

__all__ = ["OPEN", "PAGES", "Gate", "Limits", "Refusal", "failure"]

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/healthz", "/readyz")
"""What anybody may ask: whether the server is there."""
PAGES = ("/", "/docs")
"""What is read without a token: nothing of the adapters is in there."""
_BODY_S = 30.0
"""A body has to come within so many seconds."""
_MARGIN_S = 5.0
"""What a reader may take longer than an answer."""
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
]


class Refusal(Exception):  # noqa: N818
    """An answer that is none, with its code."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def headers(self) -> dict[str, str]:
        """What a client is told besides."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "1"} if self.status in (429, 503) else {}


def failure(refusal: Refusal) -> dict[str, Any]:
    """Its body, as OpenAI's clients read it."""
    kind = _TYPES.get(refusal.status, "server_error" if refusal.status >= 500 else "invalid_request_error")
    return {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}}


@dataclass(frozen=True)
class Limits:
    """Who may ask, and how much. `hosts` are the names that the server goes by; None: any."""

    token: str | None
    hosts: frozenset[str] | None
    max_body: int
    timeout_s: float


class Gate:
    """An ASGI application before another one. `answered` is told (route, status, seconds) of every request."""

    def __init__(
        self, app: App, limits: Limits, *, answered: Callable[[str, int, float], None], warn: Callable[[str], None]
    ) -> None:
        self._app, self._limits, self._answered, self._warn = app, limits, answered, warn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        try:
            self._check(scope)
            taken = await self._body(scope, receive)
            with _within(self._limits.timeout_s + _MARGIN_S):
                await self._app(scope, taken, told)
        except Refusal as refusal:
            await _refuse(refusal, told)
        except asyncio.TimeoutError:
            if not status:
                await _refuse(Refusal(503, "no answer within the time that a request may take"), told)
        except Exception as error:
            # What it says is for the server's side: it may name files.
            self._warn(f"internal error: {type(error).__name__}: {error}")
            if not status:
                await _refuse(Refusal(500, "internal error"), told)
        route = scope.get("route")
        self._answered(getattr(route, "path", "none"), status, time.perf_counter() - started)

    def _check(self, scope: Scope) -> None:
        if sum(name == b"host" for name, _ in scope["headers"]) > 1:
            raise Refusal(400, "a request has one Host header")
        if scope["path"] in OPEN:
            return
        headers = dict(scope["headers"])
        limits = self._limits
        if limits.token is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            is_right = scheme.lower() == b"bearer" and hmac.compare_digest(given, limits.token.encode())
            if not is_right and scope["path"] not in PAGES:
                raise Refusal(401, "a token is needed: Authorization: Bearer TOKEN", code="invalid_api_key")
        elif limits.hosts is not None and _host(headers.get(b"host", b"")) not in limits.hosts:
            # A page of another site, whose name was made to lead here (DNS rebinding), may not ask.
            raise Refusal(403, "this host name is not the server's")

    async def _body(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` with the whole body in it."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > self._limits.max_body:
            raise self._too_large()
        try:
            with _within(min(_BODY_S, self._limits.timeout_s)):
                body = await self._read(receive)
        except asyncio.TimeoutError:
            raise Refusal(408, "the request's body did not come in time") from None
        is_given = False

        async def give() -> Message:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return give

    async def _read(self, receive: Receive) -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refusal(400, "the client left")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._limits.max_body:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> Refusal:
        return Refusal(413, f"a request may have {self._limits.max_body:,} bytes")


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Break the block off after so many seconds, with asyncio.TimeoutError. asyncio.timeout is not in Python 3.10, and
    asyncio.wait_for makes a task of its own there.
    """
    task, is_late = asyncio.current_task(), False
    assert task is not None

    def late() -> None:
        nonlocal is_late
        is_late = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, late)
    try:
        yield
    except asyncio.CancelledError:
        if is_late:
            raise asyncio.TimeoutError from None
        raise
    finally:
        timer.cancel()


def _host(header: bytes) -> str:
    """The name in a Host header, without its port."""
    name = header.decode("latin-1").lower()
    return name.partition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]


async def _refuse(refusal: Refusal, send: Send) -> None:
    body = json.dumps(failure(refusal)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    named = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": named})
    await send({"type": "http.response.body", "body": body})
