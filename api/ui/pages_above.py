"""Of each form the page on which it stands: the nearest page above the form's address."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import Request, Response

_OF_THE_FORM = ("fastapi", "fastapi_inner_astack", "fastapi_function_astack", "path_params", "route", "endpoint")


async def shown(request: Request, path: str) -> Response | None:
    """The page at the path or nearest above it, as this browser may see it; None: it may see none of them."""
    for above in _upwards(path):
        page = await _asked(request, above)
        if page.status_code == 200:
            return page
    return None


def _upwards(path: str) -> Iterator[str]:
    """The path, then each above it, without the first of all: `/ui` leads elsewhere."""
    while path.count("/") >= 2:
        yield path
        path = path.rpartition("/")[0]


async def _asked(request: Request, path: str) -> Response:
    """What a GET of the path answers, asked inside of this request: its sign-in and what it knows of the form hold."""
    scope = {name: value for name, value in request.scope.items() if name not in _OF_THE_FORM}
    scope |= {"method": "GET", "path": path, "raw_path": path.encode(), "query_string": b""}
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await request.app.router(scope, receive, send)
    page = Response(b"".join(message.get("body", b"") for message in sent), status_code=sent[0]["status"])
    page.raw_headers = list(sent[0]["headers"])
    return page
