"""Parts shared by all views: their class, moments in Unix seconds, and the answers that several routes give."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict


class View(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class Deleted(View):
    id: str
    object: str
    deleted: bool = True


# A download's answer: bytes, whatever they are.
BYTES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The bytes.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def seconds(moment: datetime) -> int:
    """Unix seconds, as every timestamp of the wire."""
    return int(moment.timestamp())


def maybe_seconds(moment: datetime | None) -> int | None:
    return None if moment is None else seconds(moment)
