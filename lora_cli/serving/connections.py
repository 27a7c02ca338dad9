"""Connections: how many there may be, how long one may take to say what it wants, and how much. Knows uvicorn."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lora_cli.serving.gate import Refusal, failure

__all__ = ["connection_type"]

_HEAD_S = 10.0
"""A request's head has to come within so many seconds."""
_HEAD_BYTES = 1 << 16
"""Of which it may have so many, but for what comes at once with its end."""


def connection_type(most: int) -> type[asyncio.Protocol]:
    """The class of a server's connections, of which there are `most` at a time."""
    return type("_Connection", (_Connection,), {"most": most})


class _Connection(HttpToolsProtocol):
    """One with a slow or an endless head is closed, and so is one too many."""

    most: int
    _timer: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most:
            body = json.dumps(failure(Refusal(503, "too many connections; try again later"))).encode()
            head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
            transport.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            self.connections.discard(self)
            transport.close()
        self._watch()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch()
        if self._waits_for_head:
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("Request head too large.")
        else:
            self._head_bytes = 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    @property
    def _waits_for_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

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
