"""/metrics: the installation in figures, for Prometheus."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from api.deps import DoorDep, Needs
from shared.tenants import keys
from shared.tenants.keys import Caller

router = APIRouter(tags=["pool"])


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def metrics(door: DoorDep, _: Annotated[Caller, Depends(Needs(keys.METRICS))]) -> Response:
    """Figures of the whole installation in Prometheus' text format, for keys with the scope `metrics` or `admin`."""
    return Response(door.measures.page(), media_type=CONTENT_TYPE_LATEST)
