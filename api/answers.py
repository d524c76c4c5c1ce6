"""JSON answers, written directly from their views. FastAPI would validate every view again, in another thread."""

from __future__ import annotations

from fastapi import Response
from pydantic import BaseModel


def written(view: BaseModel, **headers: str) -> Response:
    """The view as JSON. Header names with underscores for hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(view.model_dump_json(), media_type="application/json", headers=named)
