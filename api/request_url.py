"""Refuses URLs that no route can serve, before they reach a handler or the database; takes one slash too many."""

from __future__ import annotations

from typing import Final
from urllib.parse import unquote_to_bytes

from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import answer
from shared.errors import Invalid, NotFound

MAX_QUERY_BYTES: Final = 8192


class RequestUrl:
    """Postgres text holds no NUL, and what it cannot hold it cannot find either."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _drop_slash(scope)
        suspect = scope["query_string"] or "\x00" in scope["path"]
        fault = _fault(scope["path"], scope["query_string"]) if suspect else None
        if fault is None:
            await self._app(scope, receive, send)
        else:
            await answer(fault)(scope, receive, send)


def _drop_slash(scope: Scope) -> None:
    """`/v1/files/` is `/v1/files`. A redirect would cost the client its body, or a second round trip."""
    path: str = scope["path"]
    if path.startswith("/v1/") and path.endswith("/") and len(path) > len("/v1/"):
        scope["path"] = path[:-1]


def _fault(path: str, query: bytes) -> Invalid | NotFound | None:
    if "\x00" in path:
        return NotFound("Unknown request URL: the path holds a NUL character.")
    if len(query) > MAX_QUERY_BYTES:
        return Invalid(f"The query string is longer than {MAX_QUERY_BYTES} bytes.", code="invalid_value")
    if b"\x00" in unquote_to_bytes(query):
        return Invalid("The query string holds a NUL character; remove it.", code="invalid_value")
    return None
