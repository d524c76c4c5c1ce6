"""/docs: says where the OpenAPI document is. The page has no script and loads nothing."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

router = APIRouter(include_in_schema=False)

_PAGE: Final = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Tunepool API</title>
<h1>Tunepool API</h1>
<p>The API is described in <a href="openapi.json">openapi.json</a> (OpenAPI 3.1).
Open that document with a viewer of your choice, or generate a client from it.</p>
<p>Fine-tuning, files and models follow OpenAI's API: the official <code>openai</code> clients work as they are.</p>
</html>
"""
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@router.get("/docs", response_class=HTMLResponse)
async def reference() -> HTMLResponse:
    """A page that links the OpenAPI document."""
    return HTMLResponse(_PAGE, headers=_HEADERS)
