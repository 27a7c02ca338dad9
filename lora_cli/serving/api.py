"""The routes. What they answer is computed by a scheduler's thread; who may ask is the gate's affair."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

from lora_cli import __version__
from lora_cli.errors import UnknownName, UserError, printable
from lora_cli.serving.adapters import Entry
from lora_cli.serving.answers import (
    FAILURES,
    Adapter,
    Adapters,
    ChatCompletion,
    Classified,
    Completion,
    Deleted,
    Standing,
    answering,
    describe_token,
)
from lora_cli.serving.asking import Asking, no_such_adapter, refusal_of
from lora_cli.serving.classifying import label_rows_of, rounded, texts_of
from lora_cli.serving.gate import OPEN, PAGES, Gate, Limits, Refusal, failure
from lora_cli.serving.jobs import Job, LabelJob, Piece, Stopping, WriteJob
from lora_cli.serving.metrics import CONTENT_TYPE, Metrics
from lora_cli.serving.openai import Reply, decode_of, event, fields_of, logprobs_of, rows_of, seed_of
from lora_cli.serving.refusals import add_handlers, check_json
from lora_cli.serving.scheduler import Scheduler
from lora_cli.serving.schemas import (
    AdapterRequest,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    WriteRequest,
)
from lora_cli.serving.try_page import POLICY, api_page, try_page
from lora_cli.serving.writing import is_stepwise
from lora_cli.spec import ServeSpec

__all__ = ["build_app"]

T = TypeVar("T")
_JSON = [Depends(check_json)]


def build_app(
    scheduler: Scheduler,
    spec: ServeSpec,
    *,
    token: str | None,
    hosts: frozenset[str] | None,
    warn: Callable[[str], None],
    started: Callable[[], None] = lambda: None,
) -> Gate:
    """The application; the scheduler starts and stops with it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        started()
        yield
        await asyncio.to_thread(scheduler.stop, spec.grace_s)

    metrics = Metrics(scheduler)
    app = FastAPI(
        title="lora serve",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses=FAILURES,
    )
    routes = _Routes(scheduler, spec, metrics)
    routes.add_to(app)
    add_handlers(app)
    if token is not None:
        describe_token(app)
    limits = Limits(token, hosts, spec.max_body, spec.timeout_s)
    return Gate(app, limits, answered=metrics.answered, warn=warn)


class _Routes:
    """What the server answers."""

    def __init__(self, scheduler: Scheduler, spec: ServeSpec, metrics: Metrics) -> None:
        self._scheduler, self._pool, self._spec, self._metrics = scheduler, scheduler.pool, spec, metrics

    def add_to(self, app: FastAPI) -> None:
        """Make them the application's."""
        app.post("/v1/classify", summary="Labels or values of texts", **answering(Classified), dependencies=_JSON)(
            self.classify
        )
        app.post(
            "/v1/completions",
            summary="Answers to prompts",
            **answering(Completion, streams=True),
            dependencies=_JSON,
        )(self.complete)
        app.post(
            "/v1/chat/completions",
            summary="Answers in a conversation",
            **answering(ChatCompletion, streams=True),
            dependencies=_JSON,
        )(self.chat)
        app.get("/v1/models", summary="The adapters", **answering(Adapters))(self.models)
        app.get("/v1/models/{name}", summary="An adapter", **answering(Adapter))(self.model)
        app.post(
            "/v1/adapters",
            summary="Add, or read anew, an adapter of the folders named at start",
            **answering(Adapter),
            dependencies=_JSON,
        )(self.put)
        app.delete("/v1/adapters/{name}", summary="Let an adapter not be asked for any more", **answering(Deleted))(
            self.drop
        )
        for path, summary, function in zip(
            OPEN, ("Whether the server is there", "Whether it answers"), (self.health, self.readiness), strict=True
        ):
            app.get(path, summary=summary, **answering(Standing))(function)
            app.head(path, include_in_schema=False)(function)
        app.get("/metrics", summary="Figures for Prometheus", response_class=PlainTextResponse)(self.figures)
        app.get(PAGES[0], summary="A page to try adapters", response_class=HTMLResponse)(self.page)

        async def docs() -> Response:
            """The same as /openapi.json."""
            return _html(api_page(app.openapi()))

        app.get(PAGES[1], summary="This description, to read", response_class=HTMLResponse)(docs)

    async def classify(self, body: ClassifyRequest, request: Request) -> Response:
        """Texts → label and probabilities, or a value, each, in order."""
        entry = self._entry(body.model, writes=False)
        self._check_size(texts_of(body))
        rows = label_rows_of(entry, body)

        def make(**kept: Any) -> Job:
            return LabelJob(name=body.model, rows=rows, **kept)

        asking = Asking(self._scheduler, request, self._spec.timeout_s)
        try:
            asking.submit(make)
            _, answers = await asking.next()
        finally:
            asking.close()
        self._metrics.rows(body.model, len(answers))
        data = [{"index": index, **rounded(answer)} for index, answer in enumerate(answers)]
        # Made here: what FastAPI makes of a dict it checks and copies first.
        return JSONResponse({"object": "list", "model": body.model, "data": data})

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Prompts → texts, as OpenAI's completions."""
        self._check_size([body.prompt] if isinstance(body.prompt, str) else body.prompt)
        return await self._written(body, request)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """A conversation → its next turn, as OpenAI's chat completions."""
        self._check_size(turn.text for turn in body.messages)
        return await self._written(body, request)

    async def models(self) -> dict[str, Any]:
        """All adapters that can be asked for."""
        return {"object": "list", "data": [self._shown(entry) for entry in list(self._pool.entries.values())]}

    async def model(self, name: str) -> dict[str, Any]:
        """One of them."""
        return self._shown(self._entry(name))

    async def put(self, body: AdapterRequest) -> dict[str, Any]:
        """Let an adapter be asked for that lies in one of the folders named at start."""
        try:
            entry = await self._called(lambda: self._pool.put(body.name))
        except UnknownName:
            raise no_such_adapter("name") from None
        except (UserError, OSError) as error:
            # What it says names files of the server.
            self._pool.warn(f"{printable(body.name, 60)}: {error}")
            raise Refusal(422, "this adapter cannot be read, or does not fit the base") from error
        return self._shown(entry)

    async def drop(self, name: str) -> dict[str, Any]:
        """Nothing on disk is touched: it can be put back."""
        self._entry(name)
        try:
            await self._called(lambda: self._pool.drop(name))
        except UnknownName:
            raise no_such_adapter() from None
        return {"id": name, "object": "model", "deleted": True}

    async def health(self) -> dict[str, str]:
        """Always, as long as there is a server."""
        return {"status": "ok"}

    async def readiness(self) -> dict[str, str]:
        """Not while it stops."""
        if not self._scheduler.is_alive:
            raise Refusal(503, "not ready")
        return {"status": "ready"}

    async def figures(self) -> Response:
        """In Prometheus' text format."""
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def page(self) -> Response:
        """One page, one script, nothing from elsewhere."""
        return _html(try_page())

    async def _written(self, body: WriteRequest, request: Request) -> Response:
        entry = self._entry(body.model, writes=True)
        fields = fields_of(body)
        decode = _checked(lambda: decode_of(entry, body), fields)
        rows = _checked(lambda: rows_of(entry, body), fields)
        seed, logprobs = seed_of(body), logprobs_of(body)
        if logprobs is not None and not is_stepwise(self._pool, decode):
            raise Refusal(422, "logprobs: not of an encoder-decoder, nor with beams or penalties", param="logprobs")
        reply = Reply(body, len(rows))
        asking = Asking(self._scheduler, request, self._spec.timeout_s, fields)
        is_handed_over = False
        try:
            for row in rows:

                def make(row: dict[str, Any] = row, **kept: Any) -> Job:
                    common = {"name": body.model, "seed": seed, "streams": bool(body.stream), **kept}
                    return WriteJob(row=row, decode=decode, n=body.num_answers, logprobs=logprobs, **common)

                asking.submit(make)
            # The first event tells whether there is an answer at all: its code can still be said.
            first = await asking.next()
            if body.stream:
                asking.stream()
                is_handed_over = True
                return StreamingResponse(
                    self._events(asking, reply, first),
                    media_type="text/event-stream",
                    headers={"X-Accel-Buffering": "no"},
                )
            reply.add(*first)
            while not reply.is_done:
                reply.add(*await asking.next())
        finally:
            if not is_handed_over:
                asking.close()
        self._count(reply)
        return JSONResponse(reply.whole())

    async def _events(self, asking: Asking, reply: Reply, first: tuple[int, Piece]) -> AsyncIterator[str]:
        try:
            yield event(reply.add(*first))
            while not reply.is_done:
                yield event(reply.add(*await asking.next()))
            options = reply.body.stream_options
            if options is not None and options.include_usage:
                yield event(reply.last_chunk())
            yield event("[DONE]")
            self._count(reply)
        except Refusal as refusal:
            yield event(failure(refusal))
        finally:
            asking.close()

    def _count(self, reply: Reply) -> None:
        usage = reply.usage
        self._metrics.rows(reply.body.model, reply.num_prompts)
        self._metrics.tokens(reply.body.model, usage["prompt_tokens"], usage["completion_tokens"])

    async def _called(self, function: Callable[[], T]) -> T:
        try:
            return await asyncio.wrap_future(self._scheduler.call(function))
        except Stopping as error:
            raise refusal_of(error) from error

    def _entry(self, name: str, *, writes: bool | None = None) -> Entry:
        entry = self._pool.entries.get(name)
        if entry is None:
            raise no_such_adapter()
        if writes is not None and entry.writes != writes:
            does = "writes text: POST /v1/completions" if entry.writes else "classifies: POST /v1/classify"
            raise Refusal(422, f"this adapter {does}", param="model")
        return entry

    def _check_size(self, texts: Any) -> None:
        if sum(map(len, texts)) > self._spec.max_text:
            raise Refusal(413, f"the texts of a request may have {self._spec.max_text:,} characters together")

    def _shown(self, entry: Entry) -> dict[str, Any]:
        labels = entry.task.labels
        return {
            "id": entry.name,
            "object": "model",
            "created": entry.stamp[0][2] // 10**9 if entry.stamp else 0,
            "owned_by": "lora",
            "task": entry.task.spec.name,
            "columns": list(entry.task.columns),
            "labels": list(labels) if labels is not None else None,
            "writes": entry.writes,
            "base": self._pool.base.base_name,
        }


def _checked(read: Callable[[], T], fields: Mapping[str, str] | None = None) -> T:
    """What `read` returns; what the user can mend as an answer."""
    try:
        return read()
    except UserError as error:
        raise refusal_of(error, fields) from error


def _html(text: str) -> Response:
    return HTMLResponse(text, headers={"Content-Security-Policy": POLICY})
