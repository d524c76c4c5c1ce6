"""Gives every response an `x-request-id`, and every log line of the request the same id."""

from __future__ import annotations

import time

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.ids import new_id


class RequestId:
    """Plain ASGI: a wrapper that buffers nothing, so streams stay streams. A client's own id is not taken over."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope["request_id"] = new_id("req_")
        answer_headers: dict[str, str] = {}
        scope["answer_headers"] = answer_headers  # what whoever handles the request has to say beside its answer
        begun = time.perf_counter()

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in answer_headers.items():
                    headers[name] = value
                headers["openai-processing-ms"] = str(round((time.perf_counter() - begun) * 1000))
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            await self._app(scope, receive, tagged)
