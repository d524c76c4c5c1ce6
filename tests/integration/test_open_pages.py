"""What anybody may ask without a key: it is cheap, tells nothing of other people's work, and loads nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2
import pytest
from sqlalchemy import event

from api.app import create_app
from tests.integration.conftest import Api
from tests.integration.test_bad_requests import refused
from tests.live import served
from tests.patience import patience


@contextmanager
def counted(api: Api) -> Iterator[tuple[str, list[str]]]:
    """A live API, and every statement that it sends to its database."""
    app, said = create_app(api.settings), list[str]()
    event.listen(
        app.state.door.engine, "before_cursor_execute", lambda _c, _cursor, statement, *_: said.append(statement)
    )
    with served(app) as url:
        yield url, said


def test_fifty_who_ask_whether_it_is_ready_cost_the_database_a_few_looks(api: Api) -> None:
    with counted(api) as (url, said):
        httpx2.get(f"{url}/readyz", timeout=patience(20))
        one_look = len(said)
        said.clear()
        with httpx2.Client(base_url=url, timeout=patience(30)) as http, ThreadPoolExecutor(16) as clients:
            begun = time.monotonic()
            answers = [one.result() for one in [clients.submit(http.get, "/readyz") for _ in range(50)]]
            seconds = time.monotonic() - begun

    assert {answer.status_code for answer in answers} == {200}
    assert one_look > 0
    assert len(said) <= one_look * (2 + seconds)


def test_counts_of_other_peoples_work_are_told_to_those_with_a_key_only(api: Api) -> None:
    names = ("queued", "running", "devices")
    with api.http() as known, httpx2.Client(base_url=api.url, timeout=patience(20)) as anybody:
        told, hidden = known.get("/readyz").json(), anybody.get("/readyz").json()
        junk = anybody.get("/readyz", headers={"Authorization": "Bearer tp_junk"})

    assert [isinstance(told[name], int) for name in names] == [True] * 3
    assert [hidden[name] for name in names] == [None] * 3
    assert hidden["status"] == "ok"
    refused(api, junk, status=401)


def test_the_page_of_the_api_holds_no_script_and_loads_nothing(api: Api) -> None:
    with httpx2.Client(base_url=api.url, timeout=patience(20)) as http:
        page, document, redoc = http.get("/docs"), http.get("/openapi.json"), http.get("/redoc")

    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert re.findall(r"<script|<link|<img|\bsrc=|://", page.text) == []
    assert re.findall(r'href="([^"]*)"', page.text) == ["openapi.json"]
    assert document.json()["info"]["title"] == "Tunepool"
    refused(api, redoc, status=404)


@pytest.mark.parametrize("path", ["/docs/oauth2-redirect", "/redoc"])
def test_no_other_page_of_the_framework_is_served(api: Api, path: str) -> None:
    with httpx2.Client(base_url=api.url, timeout=patience(20)) as http:
        refused(api, http.get(path), status=404)
