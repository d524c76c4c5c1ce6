"""Applications of one process that share what FastAPI made of their routes (tests/shared_routes.py)."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest import mock

import pytest
from fastapi import FastAPI

from api.app import create_app
from shared.settings import Settings
from tests import shared_routes


def answer(app: FastAPI, method: str, path: str) -> tuple[int, bytes]:
    """Status and body of a request without key or body."""
    sent: list[Any] = []
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"x"), (b"x-request-id", b"req_same")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


@pytest.fixture
def settings(settings: Settings) -> Settings:
    away = "postgresql+psycopg://nobody@127.0.0.1:1/nowhere"
    return settings.model_copy(update={"database_url": away, "redis_url": ""})


def test_an_application_that_shares_its_routes_has_those_of_one_that_does_not(settings: Settings) -> None:
    first, sharing = create_app(settings), create_app(settings.model_copy(update={"max_streams": 7}))
    with mock.patch.object(FastAPI, "include_router", shared_routes._included):
        alone = create_app(settings)

    shared = [route for route in sharing.router.routes if any(route is one for one in first.router.routes)]
    assert len(shared) > 30
    assert not [route for route in alone.router.routes if any(route is one for one in first.router.routes)]
    assert [type(route) for route in sharing.router.routes] == [type(route) for route in alone.router.routes]
    assert sharing.openapi() == alone.openapi()
    for method, path in (("GET", "/livez"), ("GET", "/v1/models"), ("PUT", "/v1/files"), ("GET", "/v1/nothing")):
        assert answer(sharing, method, path) == answer(alone, method, path)


def test_an_application_that_shares_its_routes_has_a_door_of_its_own(settings: Settings) -> None:
    first, second = create_app(settings), create_app(settings.model_copy(update={"max_streams": 7}))

    assert first.state.door is not second.state.door
    assert (first.state.door.settings.max_streams, second.state.door.settings.max_streams) == (
        settings.max_streams,
        7,
    )
