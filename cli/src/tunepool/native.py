"""Requests to the server's own routes, under `/v1/tunepool`, on the official client's connection and errors."""

from __future__ import annotations

from typing import Any, cast
from urllib.parse import quote

import typer


def get(context: typer.Context, path: str, **query: Any) -> dict[str, Any]:
    given = {name: value for name, value in query.items() if value is not None}
    return _document(context.obj.client.get(f"/tunepool/{path}", cast_to=object, options={"params": given}))


def post(context: typer.Context, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    return _document(context.obj.client.post(f"/tunepool/{path}", cast_to=object, body=body))


def patch(context: typer.Context, path: str, body: dict[str, Any]) -> dict[str, Any]:
    return _document(context.obj.client.patch(f"/tunepool/{path}", cast_to=object, body=body))


def put(context: typer.Context, path: str, body: dict[str, Any]) -> dict[str, Any]:
    return _document(context.obj.client.put(f"/tunepool/{path}", cast_to=object, body=body))


def delete(context: typer.Context, path: str) -> dict[str, Any]:
    return _document(context.obj.client.delete(f"/tunepool/{path}", cast_to=object))


def _document(answer: object) -> dict[str, Any]:
    return cast("dict[str, Any]", answer)


def part(text: str) -> str:
    """An id as one part of a path."""
    return quote(text, safe=":")
