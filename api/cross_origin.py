"""Lets pages of named origins ask the API from a browser (CORS, the Fetch standard).

Who asks is told by a key in a header, as everywhere. Cookies are not let in: no answer has
`Access-Control-Allow-Credentials`, so that no page acts as whoever is signed in to ours.
"""

from __future__ import annotations

from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ANY: Final = "*"
_API: Final = "/v1/"  # our own pages are nobody else's affair
_METHODS: Final = "GET, POST, PUT, PATCH, DELETE"
# So long a browser asks no second time before requests of one kind; none of them keeps it longer than two hours.
_PREFLIGHT_SECONDS: Final = "600"


class CrossOrigin:
    """Plain ASGI. Origins that are not named are answered as before, and their browsers keep the answer from them."""

    def __init__(self, app: ASGIApp, *, origins: frozenset[str]) -> None:
        self._app, self._origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(_API):
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope)
        allowed = self._allowed(asked.get("origin"))
        if allowed is not None:
            # By this way, and not by `send`, an answer to a fault of ours has them too.
            scope["answer_headers"] |= {"access-control-allow-origin": allowed, "access-control-expose-headers": ANY}
            if scope["method"] == "OPTIONS" and "access-control-request-method" in asked:
                await _preflight(asked)(scope, receive, send)
                return

        async def varied(message: Message) -> None:
            if message["type"] == "http.response.start" and ANY not in self._origins:
                MutableHeaders(scope=message).add_vary_header("Origin")  # a cache keeps one answer per origin
            await send(message)

        await self._app(scope, receive, varied)

    def _allowed(self, origin: str | None) -> str | None:
        """The origin that the answer allows to a page of `origin`; None allows none."""
        if origin is None:
            return None
        if ANY in self._origins:
            return ANY
        return origin if origin in self._origins else None


def _preflight(asked: Headers) -> Response:
    """The answer to a browser that asks whether it may ask. It brings no key yet."""
    headers = {"access-control-allow-methods": _METHODS, "access-control-max-age": _PREFLIGHT_SECONDS}
    wanted = asked.get("access-control-request-headers")
    if wanted:
        # OpenAI's client sends a dozen of its own; `*` would not stand for Authorization.
        headers["access-control-allow-headers"] = wanted
    return Response(status_code=204, headers={**headers, "vary": "Origin, Access-Control-Request-Headers"})
