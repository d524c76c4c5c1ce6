"""Gives every response an `x-request-id`, and every log line of the request the same id; answers our own faults."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import request_span
from api.errors import answer, unexpected
from shared.errors import Invalid
from shared.ids import new_id

if TYPE_CHECKING:
    from shared.operating.spans import Spans


RawHeader = tuple[bytes, bytes]

# The version of the REST API that OpenAI's own answers name, since 2020.
API_VERSION: Final = "2020-10-01"
# Under which a client finds its own request again: as OpenAI documents it, ASCII, of at most 512 characters.
_CLIENT_ID: Final = b"x-client-request-id"
_CLIENT_ID_SHAPE: Final = re.compile(rb"[\x20-\x7e]{1,512}")


class RequestId:
    """Plain ASGI: a wrapper that buffers nothing, so streams stay streams.

    A client's own id (`X-Client-Request-Id`) does not take our id's place: it stands beside it, in log and answer.
    """

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
        span = None if self._spans is None else request_span.begin(self._spans, scope)
        clients, app = _clients_id(scope), self._app
        if clients == "":
            app = answer(_BAD_CLIENT_ID)
        started = False

        async def tagged(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                seconds = time.perf_counter() - begun
                answer_headers["x-request-id"] = request_id
                answer_headers["openai-version"] = API_VERSION
                if clients:
                    answer_headers["x-client-request-id"] = clients
                answer_headers["openai-processing-ms"] = str(round(seconds * 1000))
                message["headers"] = _with(message["headers"], answer_headers)
                route = getattr(scope.get("route"), "path", "none")  # a path itself may be anything
                self._answered(scope["method"], route, message["status"], seconds)
                if span is not None:
                    span.answered(route, message["status"])
            await send(message)

        fields = {"request_id": request_id, **({} if span is None else span.log_fields)}
        if clients:
            fields["client_request_id"] = clients
        bound = structlog.contextvars.bind_contextvars(**fields)
        try:
            await app(scope, receive, tagged)
        except Exception as error:
            # Answered here and not by Starlette, which stands outside of us: a fault is counted and traced as well.
            if not started:
                await unexpected(scope, error)(scope, receive, tagged)
            raise
        finally:
            structlog.contextvars.reset_contextvars(**bound)
            if span is not None:
                span.end()


def _clients_id(scope: Scope) -> str | None:
    """The id that the client gave its request; None without one, and empty for one that is not taken."""
    given = next((value for name, value in scope["headers"] if name == _CLIENT_ID), None)
    if given is None:
        return None
    return given.decode("ascii") if _CLIENT_ID_SHAPE.fullmatch(given) else ""


_BAD_CLIENT_ID: Final = Invalid(
    "X-Client-Request-Id must be 1 to 512 ASCII characters, none of them a control character.",
    param="X-Client-Request-Id",
)


def _with(headers: Iterable[RawHeader], added: Mapping[str, str]) -> list[RawHeader]:
    """An answer's headers, with ours in place of any of the same names. All names are in lower case."""
    ours = {name.encode("latin-1"): value.encode("latin-1") for name, value in added.items()}
    return [header for header in headers if header[0] not in ours] + list(ours.items())
