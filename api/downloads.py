"""How people get what is stored: links to objects, and the headers of a download."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from api import byte_ranges, errors
from api.byte_ranges import ByteRange, OutOfRange
from api.deps import Door
from api.views import error_views, product_views, view
from shared.errors import Invalid
from shared.products.adapters import StoredFile
from shared.store.storage import ObjectFacts

PARTS: Final = {
    **view.BYTES,
    206: {**view.BYTES[200], "description": "The bytes of the one range that `Range` asks for."},
    416: {"model": error_views.ErrorEnvelope, "description": "The range begins behind the end."},
}


def linked(files: Iterable[StoredFile], door: Door, request: Request) -> list[product_views.AdapterFile]:
    """Files as their downloaders see them."""
    return [
        product_views.AdapterFile(
            name=file.name, bytes=file.bytes, sha256=file.sha256, url=_link(file.key, file.name, door, request)
        )
        for file in files
    ]


def _link(key: str, name: str, door: Door, request: Request) -> str:
    signed = door.store.presign(key, seconds=door.settings.link_seconds)
    if signed is not None:
        return signed
    base = door.settings.public_url.rstrip("/") or str(request.base_url).rstrip("/")
    return f"{base}/v1/tunepool/objects/{door.links.make(key, name=name)}"


def attachment(filename: str, *, size: int | None = None) -> dict[str, str]:
    """Headers of a download: never shown in place, whatever it holds."""
    headers = {
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(filename)}",
        "X-Content-Type-Options": "nosniff",
    }
    return headers if size is None else {**headers, "Content-Length": str(size)}


async def sent(key: str, name: str, *, door: Door, request: Request) -> Response:
    """The bytes of an object, or those of one range. Raises NotFound, Unavailable."""
    facts = await door.store.facts(key)
    try:
        part = byte_ranges.wanted(_range_of(request, facts), size=facts.bytes)
    except OutOfRange:
        return _out_of_range(facts)
    headers = _headers(facts, part, name)
    status, kind = (200 if part is None else 206), "application/octet-stream"
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=kind)
    if part is None:
        chunks = await door.store.stream(key)
    else:
        chunks = await door.store.stream_part(key, part.start, part.end)
    return StreamingResponse(chunks, status_code=status, media_type=kind, headers=headers)


def _range_of(request: Request, facts: ObjectFacts) -> str | None:
    """The Range header; None where If-Range names other bytes, and where RFC 9110 defines none: on all but GET."""
    if request.method != "GET" or request.headers.get("if-range", facts.etag) != facts.etag:
        return None
    return request.headers.get("range")


def _headers(facts: ObjectFacts, part: ByteRange | None, name: str) -> dict[str, str]:
    size = facts.bytes if part is None else part.end - part.start
    headers = {**attachment(name.rsplit("/", 1)[-1], size=size), "Accept-Ranges": "bytes"}
    if facts.etag is not None:
        headers["ETag"] = facts.etag
    return headers if part is None else {**headers, "Content-Range": part.content_range}


def _out_of_range(facts: ObjectFacts) -> Response:
    response = errors.answer(
        Invalid(
            f"The range begins behind the end of the file, which has {facts.bytes} bytes. Ask for bytes below that.",
            param="Range",
            code="range_not_satisfiable",
        )
    )
    response.headers["Content-Range"] = f"bytes */{facts.bytes}"
    return response
