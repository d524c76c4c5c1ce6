"""Compresses JSON answers with gzip for clients that take it. Nothing else: no stream, no file, no part of one.

Starlette's own middleware would compress files and their ranges, and streams of JSON lines, too.
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Final

from anyio import to_thread
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LEAST_BYTES: Final = 1024  # a smaller answer fits into a packet anyhow
LEVEL: Final = 1  # a list of jobs becomes a fifth; level 6 takes twice the time for a sixth
ALONE_BYTES: Final = 128 * 1024  # the process answers others while more than this is compressed
# Pages and their figures are apart: they belong to a cookie, and what is compressed shows its content by its length.
_APART: Final = "/ui"
# An answer with one of these is packed already, or a part of one, or may be asked for in parts.
_PARTIAL: Final = frozenset({b"content-encoding", b"content-range", b"accept-ranges"})


class GzipJson:
    """Plain ASGI. Answers that it leaves alone go through untouched, and at once."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "HEAD" or scope["path"].startswith(_APART):
            await self._app(scope, receive, send)
            return
        held: Message | None = None

        async def packed(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start" and _may_be_packed(message):
                held = message  # until its length is known
                return
            if held is not None:
                if _is_long(message):
                    message = await _packed(held, message, takes_gzip(scope))
                await send(held)
                held = None
            await send(message)

        await self._app(scope, receive, packed)


def _may_be_packed(start: Message) -> bool:
    headers = dict(start["headers"])
    json = headers.get(b"content-type", b"").partition(b";")[0] == b"application/json"
    return json and _PARTIAL.isdisjoint(headers)


def _is_long(message: Message) -> bool:
    """Whether it is a whole body that is worth the work."""
    whole = message["type"] == "http.response.body" and not message.get("more_body", False)
    return whole and len(message.get("body", b"")) >= LEAST_BYTES


async def _packed(start: Message, message: Message, takes: bool) -> Message:
    """The body as it is sent, and the headers that tell of it."""
    body: bytes = message["body"]
    headers = MutableHeaders(raw=start["headers"])
    headers.add_vary_header("Accept-Encoding")
    if not takes:
        return message
    content = _gzip(body) if len(body) < ALONE_BYTES else await to_thread.run_sync(_gzip, body)
    headers["Content-Encoding"] = "gzip"
    headers["Content-Length"] = str(len(content))
    etag = headers.get("etag")
    if etag is not None and not etag.startswith("W/"):
        headers["ETag"] = f"W/{etag}"  # the same document in other bytes (RFC 9110, 8.8.1)
    start["headers"] = headers.raw
    return {**message, "body": content}


def _gzip(body: bytes) -> bytes:
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, zlib.MAX_WBITS | 16)  # 16: with gzip's head and tail
    return packer.compress(body) + packer.flush()


def takes_gzip(scope: Scope) -> bool:
    """Whether a client wants gzip rather than nothing (RFC 9110, 12.5.3)."""
    return _accepted(b",".join(value for name, value in scope["headers"] if name == b"accept-encoding"))


@lru_cache(maxsize=64)  # few kinds of clients send most requests
def _accepted(codings: bytes) -> bool:
    weights: dict[str, float] = {}
    for coding in codings.decode("latin-1").split(","):
        name, _, rest = coding.partition(";")
        weights[name.strip().lower()] = _weight(rest)
    return weights.get("gzip", weights.get("x-gzip", weights.get("*", 0.0))) > 0.0


def _weight(text: str) -> float:
    name, _, value = text.partition("=")
    if name.strip().lower() != "q":
        return 1.0
    try:
        return float(value)
    except ValueError:
        return 0.0
