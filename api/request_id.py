"""Gives every response an `x-request-id`, and every log line of the request the same id."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import request_span
from shared.ids import new_id

if TYPE_CHECKING:
    from shared.operating.spans import Spans


class RequestId:
    """Plain ASGI: a wrapper that buffers nothing, so streams stay streams. A client's own id is not taken over."""

    def __init__(
        self, app: ASGIApp, *, answered: Callable[[str, str, int, float], None], spans: Spans | None = None
    ) -> None:
        """`answered`: (method, the route's template, status, seconds) of each request. `spans`: None without traces."""
        self._app, self._answered, self._spans = app, answered, spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope["request_id"] = new_id("req_")
        answer_headers: dict[str, str] = {}
        scope["answer_headers"] = answer_headers  # what whoever handles the request has to say beside its answer
        begun = time.perf_counter()
        span = request_span.begin(self._spans, scope)

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in answer_headers.items():
                    headers[name] = value
                seconds = time.perf_counter() - begun
                headers["openai-processing-ms"] = str(round(seconds * 1000))
                route = getattr(scope.get("route"), "path", "none")  # a path itself may be anything
                self._answered(scope["method"], route, message["status"], seconds)
                if span is not None:
                    span.answered(route, message["status"])
            await send(message)

        fields = {} if span is None else span.log_fields
        try:
            with structlog.contextvars.bound_contextvars(request_id=request_id, **fields):
                await self._app(scope, receive, tagged)
        finally:
            if span is not None:
                span.end()
