"""A request that waits for the thread that computes: jobs go there, events come back into asyncio's loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request

from lora_cli.errors import ConfigError, DataError, UnknownName, UserError
from lora_cli.serving.gate import Refusal
from lora_cli.serving.jobs import Busy, Job, Late, Stopping
from lora_cli.serving.pool import Full, Unavailable
from lora_cli.serving.scheduler import Scheduler

__all__ = ["Asking", "no_such_adapter", "refusal_of"]


class Asking:
    """The jobs of one request, and what is told of them. To be closed: what is not done then is not wanted any more.

    `fields` are those of the request, by the config keys and the data for which they stand.

    Raises:
        Refusal: from `next`: the job failed, it took too long, or the client left.
    """

    def __init__(
        self, scheduler: Scheduler, request: Request, timeout_s: float, fields: Mapping[str, str] | None = None
    ) -> None:
        self._scheduler, self._deadline = scheduler, time.monotonic() + timeout_s
        self._fields = fields or {}
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._jobs: list[Job] = []
        self._gone: asyncio.Task[None] | None = asyncio.create_task(self._watch(request))
        # The thread keeps the deadline too; but it may be in the middle of a long step.
        late = Late("no answer in time")
        self._timer = self._loop.call_later(timeout_s + 1, self._events.put_nowait, (0, late))

    def submit(self, make: Callable[..., Job]) -> None:
        """Let the job wait that `make(tell=, deadline=)` makes; its number is how many there were before.

        Raises:
            Refusal: too many wait, or the server is stopping.
        """
        number = len(self._jobs)

        def tell(event: Any) -> None:
            # The loop may have ended meanwhile.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        job = make(tell=tell, deadline=self._deadline)
        self._jobs.append(job)
        try:
            self._scheduler.submit(job)
        except (Busy, Stopping) as error:
            raise refusal_of(error) from error

    async def next(self) -> tuple[int, Any]:
        """(number of a job, what it tells)."""
        number, event = await self._events.get()
        if isinstance(event, Refusal):
            raise event
        if isinstance(event, Exception):
            raise refusal_of(event, self._fields) from event
        return number, event

    def stream(self) -> None:
        """From now on somebody else looks whether the client is there."""
        if self._gone is not None:
            self._gone.cancel()
            self._gone = None

    def close(self) -> None:
        """Nobody waits any more."""
        self.stream()
        self._timer.cancel()
        for job in self._jobs:
            job.is_cancelled = True

    async def _watch(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait((0, Refusal(400, "the client left")))


def refusal_of(error: Exception, fields: Mapping[str, str] | None = None) -> Refusal | Exception:
    """What a client is told of an error; what is no answer to it stays what it is.

    `fields` are what the client knows config keys, and places in the data, by.
    """
    if isinstance(error, Busy):
        return Refusal(429, str(error), code="queue_full")
    if isinstance(error, Late | Stopping | Full):
        return Refusal(503, str(error))
    if isinstance(error, Unavailable):
        # Asked again, it would fail again.
        return Refusal(500, str(error), code="adapter_unavailable")
    if isinstance(error, UnknownName) and error.key == "model":
        return no_such_adapter()
    if isinstance(error, ConfigError) and fields and error.key in fields:
        field = fields[error.key]
        return Refusal(422, str(ConfigError(field, error.value, error.allowed)), param=field)
    if isinstance(error, DataError) and fields and error.where in fields:
        field = fields[str(error.where)]
        return Refusal(422, str(DataError(field, error.problem)), param=field)
    if isinstance(error, UserError):
        return Refusal(422, str(error))
    return error


def no_such_adapter(param: str = "model") -> Refusal:
    """The client's own words are not repeated: they may be anything."""
    return Refusal(404, "no such adapter; GET /v1/models lists them", code="model_not_found", param=param)
