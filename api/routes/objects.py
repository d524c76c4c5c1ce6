"""/v1/tunepool/objects: files by their signed links, where the store cannot sign. A broken download can be resumed."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from api.deps import DoorDep
from api.downloads import PARTS, sent

router = APIRouter(prefix="/v1/tunepool", tags=["tunepool"])


@router.head("/objects/{token}", include_in_schema=False)
@router.get("/objects/{token}", response_class=StreamingResponse, responses=PARTS)
async def download_object(token: str, request: Request, door: DoorDep) -> Response:
    """A file by its signed link; the link is the permission. `HEAD`, and `Range` of one range, are understood."""
    key, name = door.links.open(token)
    return await sent(key, name, door=door, request=request)
