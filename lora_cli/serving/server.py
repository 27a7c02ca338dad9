"""A server that listens until it is told to stop. Knows uvicorn, addresses and tokens; nothing of routes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import math
import os
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from lora_cli.errors import ConfigError, printable
from lora_cli.serving.connections import connection_type
from lora_cli.spec import ServeSpec

__all__ = [
    "Ending",
    "address_of",
    "allowed_hosts",
    "build_server",
    "is_loopback",
    "listen",
    "open_socket",
    "read_token",
]

_VARIABLE = "LORA_SERVE_TOKEN"
_MAX_TOKEN = 4096
_BACKLOG = 512
_PARTING_S = 3
"""Whoever is told that the time is up has so long to hear it."""
_TURN_S = 1e-4
"""Seconds after which a thread that runs Python lets another one. Python's own are 5 ms, which the thread that computes
would wait for at every operation as long as requests are read."""


def open_socket(spec: ServeSpec, token: str | None) -> socket.socket:
    """A socket that listens where `spec` says.

    Raises:
        ConfigError: the host is no address of this machine; others reach it and there is no token; the port is taken.
    """
    family = socket.AF_INET6 if ":" in spec.host else socket.AF_INET
    try:
        socket.getaddrinfo(spec.host, spec.port, family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError("serve.host", spec.host, f"leads to no address: {reason}") from error
    if token is None and not is_loopback(spec.host):
        needed = f"other machines reach it, so it needs a token: serve.token_file=FILE, or {_VARIABLE}"
        raise ConfigError("serve.host", spec.host, needed)
    try:
        return socket.create_server((spec.host, spec.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError("serve.host", spec.host, "is no address of this machine") from error
        raise ConfigError("serve.port", spec.port, f"not on {spec.host}: {error.strerror}") from error


def read_token(spec: ServeSpec) -> str | None:
    """The token that requests have to bear; None: none. Not a config key, as those are seen and saved.

    Raises:
        ConfigError: the file cannot be read, is open to others, or holds no token.
    """
    if spec.token_file is None:
        return _checked(_VARIABLE, os.environ[_VARIABLE], "") if _VARIABLE in os.environ else None
    path, key = Path(spec.token_file), "serve.token_file"
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) or mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(key, path, "a file that only its owner may read: chmod 600")
        with path.open("rb") as file:
            return _checked(key, file.read(_MAX_TOKEN + 1).decode(errors="replace").strip(), path)
    except OSError as error:
        raise ConfigError(key, path, f"not readable: {error.strerror}") from error


def allowed_hosts(spec: ServeSpec, token: str | None) -> frozenset[str] | None:
    """Names by which a server without a token may be called; None: any."""
    if token is not None:
        return None
    return frozenset(("localhost", "127.0.0.1", "[::1]", f"[{spec.host}]" if ":" in spec.host else spec.host))


def address_of(listener: socket.socket) -> str:
    """Where it listens, as a browser takes it."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Ending:
    """How a server ends."""

    end: Callable[[], None]
    """Breaks off what still runs when its time is up."""
    is_over: Callable[[], bool] = lambda: False
    """Whether nothing can be answered any more."""
    waits: Callable[[int], None] = lambda number: None
    """Is told how many requests still run, if any."""


def listen(app: Callable[..., Any], listener: socket.socket, spec: ServeSpec, ending: Ending) -> None:
    """Answer requests until SIGINT or SIGTERM, which take effect when running requests have ended or their time is up;
    or until `ending` says that it is over.

    Raises:
        KeyboardInterrupt: as the signal.
    """
    with _short_turns():
        build_server(app, spec, ending).run(sockets=[listener])


def build_server(app: Callable[..., Any], spec: ServeSpec, ending: Ending) -> uvicorn.Server:
    """What `listen` runs."""
    config = uvicorn.Config(
        app,
        http=connection_type(spec.max_connections),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(spec.grace_s) + _PARTING_S,
    )
    return _Server(config, spec.grace_s, ending)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, grace_s: float, ending: Ending) -> None:
        super().__init__(config)
        self._grace_s, self._ending = grace_s, ending

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._ending.is_over()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if number := len(self.server_state.tasks):
            self._ending.waits(number)
        timer = asyncio.get_running_loop().call_later(self._grace_s, self._ending.end)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


@contextlib.contextmanager
def _short_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(_TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _checked(key: str, token: str, shown: object) -> str:
    if not 16 <= len(token) <= _MAX_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(key, printable(shown), "a token of 16 printable characters or more, without blanks")
    return token
