"""The page's parts, put together."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, FastAPI, Response

from api.ui import (
    alias_pages,
    compare_pages,
    demo_job,
    evaluation_pages,
    export_pages,
    file_pages,
    job_list_pages,
    job_pages,
    live,
    merge_pages,
    model_pages,
    new_job_pages,
    operator_pages,
    page_files,
    playground_pages,
    pool_pages,
    project_pages,
    schedule_pages,
    sign_in_pages,
    sign_in_rule_pages,
    sweep_pages,
    visits,
    webhook_pages,
)
from api.ui.page_headers import PageHeaders
from api.ui.visits import PageRoute, Visitor

entrance = APIRouter(include_in_schema=False)
closing = APIRouter(prefix="/ui", route_class=PageRoute, include_in_schema=False)


@entrance.get("/")
def enter() -> Response:
    """Who types the address alone wants to look."""
    return visits.back("/ui")


@closing.get("/{rest:path}")
def unknown_page(rest: str, visit: Visitor) -> Response:
    raise visits.no_such_page(f"/ui/{rest}")


PARTS: Final = (
    *(page_files, sign_in_pages, live, job_list_pages, merge_pages, export_pages, job_pages, pool_pages, new_job_pages),
    *(file_pages, model_pages, compare_pages, playground_pages, operator_pages, sign_in_rule_pages, demo_job),
    *(evaluation_pages, alias_pages, webhook_pages, schedule_pages, sweep_pages, project_pages),
)


def install(app: FastAPI, *, secure: bool) -> None:
    """Serve the page under /ui. `secure`: clients reach it by TLS."""
    for part in PARTS:
        app.include_router(part.router)
    app.include_router(entrance)
    app.include_router(closing)
    app.add_middleware(PageHeaders, secure=secure)
