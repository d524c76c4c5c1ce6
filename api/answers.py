"""Answers written where their view is made: FastAPI would check every view once more, in a thread of its own."""

from __future__ import annotations

from fastapi import Response
from pydantic import BaseModel


def written(view: BaseModel, **headers: str) -> Response:
    """The view as JSON. Header names with underscores for hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(view.model_dump_json(), media_type="application/json", headers=named)
