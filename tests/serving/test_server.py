"""The server's own settings: what holds while it listens is as it was before when it has ended."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from lora_cli.errors import ConfigError
from lora_cli.serving.server import Ending, listen, open_socket
from lora_cli.spec import ServeSpec


def test_a_host_that_is_another_machine_s_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^serve.host=192\.0\.2\.1: is no address of this machine$"):
        open_socket(ServeSpec(host="192.0.2.1", port=0), "a token of theirs")


def test_threads_take_short_turns_while_it_listens_and_usual_ones_afterwards() -> None:
    turns = []

    async def ends_at_once(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        turns.append(sys.getswitchinterval())
        await send({"type": "lifespan.startup.failed", "message": ""})

    before, spec = sys.getswitchinterval(), ServeSpec(port=0)
    with open_socket(spec, None) as listener, pytest.raises(SystemExit):
        listen(ends_at_once, listener, spec, Ending(lambda: None))
    assert turns == [pytest.approx(0.0001)]
    assert sys.getswitchinterval() == before


def test_it_ends_without_a_signal_once_it_is_over() -> None:
    async def starts_and_stops(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Awaitable[None]]) -> None:
        for _ in range(2):
            await send({"type": (await receive())["type"] + ".complete"})

    ticks = iter([False, True])
    with open_socket(ServeSpec(port=0), None) as listener:
        listen(starts_and_stops, listener, ServeSpec(port=0), Ending(lambda: None, lambda: next(ticks)))
    assert list(ticks) == []
