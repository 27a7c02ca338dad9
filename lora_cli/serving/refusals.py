"""What a client is told of what went wrong, in its own words: its field, the value, what is allowed. Knows FastAPI."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from lora_cli.errors import printable
from lora_cli.serving.gate import Refusal, failure

__all__ = ["add_handlers", "check_json"]

_WORDS = {
    "Input should be": "should be",
    "Field required": "it is needed",
    " after validation": "",
    "dictionary or object to extract fields from": "object",
    "dictionary": "object",
    "be False": "be false",
}
"""What pydantic says in the words of Python, in those of JSON."""


def add_handlers(app: FastAPI) -> None:
    """Let every answer that is none have the same body."""
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _failed)


def check_json(request: Request) -> None:
    """A form of another site needs nobody's leave to send text; to send JSON it does.

    Raises:
        Refusal: the body is of another type.
    """
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "content-type: application/json is needed")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse(failure(error), error.status, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    is_json = errors[0]["type"] != "json_invalid"
    return await _refused(request, _wrong(errors, error.body) if is_json else Refusal(400, "the body is no JSON"))


async def _failed(request: Request, error: Exception) -> Response:
    """What nobody foresaw, of which the gate tells the server's side."""
    return await _refused(request, Refusal(500, "internal error"))


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = Refusal(error.status_code, "no such route" if error.status_code == 404 else str(error.detail))
    return JSONResponse(failure(refusal), error.status_code, error.headers)


def _wrong(errors: Sequence[Any], body: Any) -> Refusal:
    """What is wrong with the first field that is.

    Where a field may be of several kinds, each kind complains: the one that got furthest into the value is meant.
    """
    found = [(_path(error, body), error) for error in errors]
    first = found[0][0][:1]
    path = max((path for path, _ in found if path[:1] == first), key=len)
    here = [error for other, error in found if other == path]
    said = [error for error in here if not error["type"].endswith("_type")] or here
    allowed = ", or ".join(dict.fromkeys(_allowed(error) for error in said)).replace(", or should be", ", or")
    where = ".".join(printable(part, 40) for part in path) or "body"
    value = "" if said[0]["type"] in ("missing", "unknown_field") else _shown(said[0]["input"])
    return Refusal(422, f"{where}{value}: {printable(allowed, 300)}", param=where if path else None)


def _path(error: Any, body: Any) -> list[str]:
    """Where in the body, without pydantic's names of the kinds that a field may be of."""
    path, value = [], body
    for part in error["loc"][1:]:
        is_there = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if is_there:
            path.append(str(part))
            value = value[part]
    if error["type"] == "missing" and len(error["loc"]) > 1:
        path.append(str(error["loc"][-1]))
    return path + ([error["ctx"]["field"]] if error["type"] == "unknown_field" else [])


def _allowed(error: Any) -> str:
    if error.get("ctx", {}).get("max_length") == 0:
        return "not supported; leave it out"
    said = str(error["msg"])
    for word, ours in _WORDS.items():
        said = said.replace(word, ours)
    return said


def _shown(value: Any) -> str:
    """A value that fits into a line."""
    is_short = value in ([], {}) or not isinstance(value, list | dict | bytes)
    return f"={printable(json.dumps(value, ensure_ascii=False), 60)}" if is_short else ""
