"""The page's parts, put together."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Response

from api.ui import job_list_pages, job_pages, live, page_files, pool_pages, sign_in_pages, visits
from api.ui.page_headers import PageHeaders
from api.ui.visits import PageRoute, Visitor

closing = APIRouter(prefix="/ui", route_class=PageRoute, include_in_schema=False)


@closing.get("/{rest:path}")
def unknown_page(rest: str, visit: Visitor) -> Response:
    raise visits.no_such_page(f"/ui/{rest}")


def install(app: FastAPI, *, secure: bool) -> None:
    """Serve the page under /ui. `secure`: clients reach it by TLS."""
    for part in (page_files, sign_in_pages, live, job_list_pages, job_pages, pool_pages):
        app.include_router(part.router)
    app.include_router(closing)
    app.add_middleware(PageHeaders, secure=secure)
