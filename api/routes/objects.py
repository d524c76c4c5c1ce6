"""/v1/tunepool/objects: files by their signed links, where the store cannot sign. A broken download goes on."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from api import byte_ranges, errors
from api.byte_ranges import ByteRange, OutOfRange
from api.deps import DoorDep
from api.downloads import attachment
from api.views import error_views, view
from shared.errors import Invalid
from shared.store.storage import ObjectFacts

router = APIRouter(prefix="/v1/tunepool", tags=["tunepool"])

PARTS: Final = {
    **view.BYTES,
    206: {**view.BYTES[200], "description": "The bytes of the one range that `Range` asks for."},
    416: {"model": error_views.ErrorEnvelope, "description": "The range begins behind the end."},
}


@router.head("/objects/{token}", include_in_schema=False)
@router.get("/objects/{token}", response_class=StreamingResponse, responses=PARTS)
async def download_object(token: str, request: Request, door: DoorDep) -> Response:
    """A file by its signed link; the link is the permission. `HEAD`, and `Range` of one range, are understood."""
    key, name = door.links.open(token)
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
