"""Connections: how many there may be, and how long one may take to say what it wants. Knows uvicorn."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from lora_cli.serving.gate import Refusal, failure

__all__ = ["connection_type"]

_HEAD_S = 10.0
"""A request's head has to come within so many seconds."""


def connection_type(most: int) -> type[asyncio.Protocol]:
    """The class of a server's connections, of which there are `most` at a time."""
    return type("_Connection", (_Connection,), {"most": most})


class _Connection(H11Protocol):
    """h11, as it bounds the length of a head; a slow one and one too many are closed."""

    most: int
    _timer: asyncio.TimerHandle | None = None

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
        if not self.transport.is_closing():
            super().data_received(data)
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Wait for a head, unless one is there."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = asyncio.get_running_loop().call_later(_HEAD_S, self.transport.close)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
