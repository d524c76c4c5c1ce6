"""Refuses URLs that no route can serve, before they reach a handler or the database."""

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
        fault = _fault(scope) if scope["type"] == "http" else None
        if fault is None:
            await self._app(scope, receive, send)
        else:
            await answer(fault)(scope, receive, send)


def _fault(scope: Scope) -> Invalid | NotFound | None:
    query: bytes = scope["query_string"]
    if "\x00" in scope["path"]:
        return NotFound("Unknown request URL: the path holds a NUL character.")
    if len(query) > MAX_QUERY_BYTES:
        return Invalid(f"The query string is longer than {MAX_QUERY_BYTES} bytes.", code="invalid_value")
    if b"\x00" in unquote_to_bytes(query):
        return Invalid("The query string holds a NUL character; remove it.", code="invalid_value")
    return None
