"""Turns our errors into OpenAI's envelope. Only this file knows both our errors and HTTP's status codes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Route, Router
from starlette.types import Scope

from api.not_offered import instead_of, instead_of_method
from shared import errors
from shared.tenants.plain_text import printable

log = structlog.get_logger()

RETRY_AFTER_SECONDS: Final = 2

# kind -> (status, OpenAI's `type`)
STATUS: Final[dict[type[errors.TunepoolError], tuple[int, str]]] = {
    errors.Invalid: (400, "invalid_request_error"),
    errors.Unauthenticated: (401, "invalid_request_error"),  # as OpenAI has it
    errors.Forbidden: (403, "permission_error"),
    errors.NotFound: (404, "invalid_request_error"),
    errors.Conflict: (409, "invalid_request_error"),
    errors.TooLarge: (413, "invalid_request_error"),
    errors.LimitReached: (429, "rate_limit_error"),
    errors.Unavailable: (503, "server_error"),
}
# Limits that a client's two retries do not outlast: somebody must delete something, or a job must end.
POINTLESS: Final = frozenset({"quota_exceeded", "queue_full", "too_many_schedules"})
# Codes whose number differs from their class's.
STATUS_OF_CODE: Final = {"idempotency_key_reused": 422, "unsupported_media_type": 415, "range_not_satisfiable": 416}
DATABASE_AWAY: Final = (OperationalError, InterfaceError, PoolTimeout)
_PLAIN: Final = {404: "not_found", 405: "method_not_allowed"}


def envelope(message: str, *, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    """The body of every error; all four keys are always there. Nothing in it can break a JSON encoder."""
    return {"error": {"message": printable(message), "type": kind, "param": param and printable(param), "code": code}}


def answer(error: errors.TunepoolError) -> JSONResponse:
    """A named error as a response."""
    status, kind = next(STATUS[ancestor] for ancestor in type(error).__mro__ if ancestor in STATUS)
    status = STATUS_OF_CODE.get(error.code, status)
    body = envelope(error.message, kind=kind, param=error.param, code=error.code)
    headers = _headers(status)
    if isinstance(error, errors.LimitReached) and error.retry_after_seconds is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_seconds))
    if error.code in POINTLESS:
        headers = {"x-should-retry": "false"}
    return JSONResponse(body, status_code=status, headers=headers)


def _headers(status: int) -> dict[str, str]:
    """Whether asking again helps. The openai client retries every 409, 429 and 5xx unless told not to."""
    if status == 409:
        return {"x-should-retry": "false"}
    if status == 401:
        return {"WWW-Authenticate": "Bearer"}
    if status == 429:
        return {"Retry-After": str(RETRY_AFTER_SECONDS)}
    if status == 503:
        return {"Retry-After": str(RETRY_AFTER_SECONDS), "x-should-retry": "true"}
    return {}


def install(app: FastAPI) -> None:
    """Every way out of a handler ends in the envelope; for a fault of ours api/request_id.py sees to it."""
    app.add_exception_handler(errors.TunepoolError, _named)
    app.add_exception_handler(HTTPException, _plain)
    app.add_exception_handler(RequestValidationError, _unvalidated)
    for kind in DATABASE_AWAY:
        app.add_exception_handler(kind, _database_away)
    app.add_exception_handler(ClientDisconnect, _gone)


def _named(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, errors.TunepoolError)
    if isinstance(error, errors.Unavailable) and not isinstance(error, errors.NotYet):
        # Its words name addresses and buckets: they are for the operator.
        log.error("part.away", code=error.code, error=error.message[:500])
        error = errors.Unavailable(
            "A part of the service does not answer at the moment. Try again shortly.", code=error.code
        )
    return answer(error)


def _gone(request: Request, _: Exception) -> Response:
    """Answer a client that has gone. The request left nothing behind."""
    log.info("client.gone", path=request.url.path)
    return Response(status_code=400)


def _plain(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message, headers = str(error.detail), dict(error.headers or {})
    if error.status_code == 404:
        instead = instead_of(request.url.path)
        if instead is not None:
            return _unsupported(request, instead)
        message = f"Unknown request URL: {request.method} {request.url.path[:200]}. {_where_routes_are(request)}"
    if error.status_code == 405:
        instead = instead_of_method(request.method, request.url.path)
        if instead is not None:
            return _unsupported(request, instead)
        allowed = _allowed(request)
        message = f"Not allowed to {request.method} on {request.url.path[:200]}; allowed: {allowed}."
        headers["Allow"] = allowed
    body = envelope(message, kind="invalid_request_error", param=None, code=_PLAIN.get(error.status_code))
    return JSONResponse(body, status_code=error.status_code, headers=headers)


def _unsupported(request: Request, instead: str) -> JSONResponse:
    message = f"{request.method} {request.url.path[:200]} is not offered here. {instead}"
    body = envelope(message, kind="invalid_request_error", param=None, code="unsupported")
    # The openai client retries every 5xx unless told not to.
    return JSONResponse(body, status_code=501, headers={"x-should-retry": "false"})


def _where_routes_are(request: Request) -> str:
    if not request.url.path.startswith("/v1/"):
        return "API routes begin with /v1."
    return "GET /openapi.json lists every route."


def _allowed(request: Request) -> str:
    """Every method of the path (RFC 9110, 15.5.6); the router's own header names those of one route only."""
    path, methods = request.url.path, set[str]()
    for route in _routes(request.app.routes):
        if route.path_regex.match(path):
            methods |= route.methods or set()
    return ", ".join(sorted(methods))


def _routes(routes: Iterable[BaseRoute]) -> Iterator[Route]:
    """Ours as they were written. What FastAPI makes of them, and their document, take a second of a core."""
    for route in routes:
        included: Router | None = getattr(route, "original_router", None)
        if included is not None:
            yield from _routes(included.routes)
        elif isinstance(route, Route):
            yield route


def _unvalidated(_: Request, error: Exception) -> JSONResponse:
    """Query and path values. FastAPI's own body would echo the input, which breaks on NaN and lone surrogates."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:])
    message = f"Invalid value for '{param}': {first['msg'][:200]}."
    return JSONResponse(
        envelope(message, kind="invalid_request_error", param=param, code="invalid_value"), status_code=400
    )


def _database_away(request: Request, error: Exception) -> JSONResponse:
    log.error("database.away", path=request.url.path, error=str(error)[:300])
    return answer(
        errors.Unavailable(
            "The service's database does not answer at the moment. Try again shortly.", code="database_unavailable"
        )
    )


def unexpected(scope: Scope, error: Exception) -> JSONResponse:
    """The answer to a request that met a fault of ours. It says nothing of the fault; the log does."""
    log.error("request.failed", path=scope["path"], exc_info=error)
    message = (
        "The server had an error while processing your request."
        f" Quote the request id {scope['request_id']} when you report it."
    )
    body = envelope(message, kind="server_error", param=None, code="server_error")
    return JSONResponse(body, status_code=500, headers={"x-should-retry": "true"})
