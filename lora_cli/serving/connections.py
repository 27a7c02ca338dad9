"""Connections: how many there may be, how long one may take to say what it wants, and how much. Knows uvicorn."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lora_cli.serving.gate import Refusal, failure

__all__ = ["connection_type"]

_HEAD_S = 10.0
"""A request's head has to come within so many seconds."""
_HEAD_BYTES = 1 << 16
"""Of which it may have so many, but for what comes at once with its beginning or its end."""
_AHEAD = 64
"""Requests that a client may send on a connection before they are begun, but for what comes at once."""


def connection_type(most: int) -> type[asyncio.Protocol]:
    """The class of a server's connections, of which there are `most` at a time."""
    return type("_Connection", (_Connection,), {"most": most})


class _Connection(HttpToolsProtocol):
    """One with a slow or an endless head is closed, and so is one too many."""

    most: int
    _timer: asyncio.TimerHandle | None = None
    _is_told = False
    """Whether what came last began a request, or was of its body."""
    _head_bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._refuse(Refusal(503, "too many connections; try again later"))
            self.connections.discard(self)
        self._watch()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._is_told = False
        super().data_received(data)
        self._watch()
        # Whether an answer is on its way or not: a client may send its next requests meanwhile. What ends a body in
        # pieces is a head too.
        self._head_bytes = 0 if self._is_told else self._head_bytes + len(data)
        if self._head_bytes > _HEAD_BYTES:
            self._refuse(Refusal(431, f"a request's head may have {_HEAD_BYTES:,} bytes"))
        elif len(self.pipeline) > _AHEAD:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._is_told = True
        super().on_message_begin()

    def on_body(self, body: bytes) -> None:
        self._is_told = True
        super().on_body(body)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        self._refuse(Refusal(400, "this is no request of HTTP/1.1"))

    @property
    def _waits_for_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _refuse(self, refusal: Refusal) -> None:
        """Close; with an answer, unless it would get into another one."""
        if self.transport.is_closing():
            return
        if self._waits_for_head:
            body = json.dumps(failure(refusal)).encode()
            named = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
            lines = [f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}"]
            lines += [f"{name}: {value}" for name, value in (named | refusal.headers).items()]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()

    def _watch(self) -> None:
        """Wait for a head, unless one is there."""
        if not self._waits_for_head:
            self._unwatch()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = asyncio.get_running_loop().call_later(_HEAD_S, self.transport.close)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
