"""How people get what is stored: links to objects, and the headers of a download."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import quote

from fastapi import Request

from api.deps import Door
from api.views import product_views
from shared.products.adapters import StoredFile


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
