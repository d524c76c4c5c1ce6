"""A proxy that is configured signs people in to the page; nobody else does in its name, and the API never hears it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import pytest
from pydantic import SecretStr, ValidationError
from sqlalchemy import select

from api.app import create_app
from shared.settings import Settings
from shared.store.db import session_scope
from shared.store.tables import AuditRow
from shared.tenants import keys
from tests.factories import make_key
from tests.integration.conftest import Api
from tests.live import live_api
from tests.patience import patience

SECRET = "s" * 32
HEADER = "X-Auth-Request-Email"
EVE = {HEADER: "Eve@example.com", "X-Tunepool-Proxy-Secret": SECRET}


@pytest.fixture(scope="module")
def address(api: Api) -> Iterator[str]:
    behind = {"page_proxy_header": HEADER, "page_proxy_secret": SecretStr(SECRET)}
    with live_api(api.settings.model_copy(update=behind)) as url:
        yield url


@pytest.fixture(scope="module")
def eves(api: Api) -> tuple[str, str]:
    """Keys of two projects that stand for Eve."""
    with session_scope(api.engine) as session:
        own, _ = keys.create(session, project_id=api.caller.project_id, name="eve@example.com", scopes=("jobs:read",))
        other, _ = make_key(session)
        second, _ = keys.create(session, project_id=other.project_id, name="eve@example.com", scopes=("*",))
        return own.id, second.id


@contextmanager
def client(url: str, headers: list[tuple[str, str]] | dict[str, str]) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=url, headers=headers, timeout=patience(20)) as opened:
        yield opened


def test_who_came_through_the_proxy_chooses_a_key_of_theirs_and_is_signed_in(
    api: Api, address: str, eves: tuple[str, str]
) -> None:
    with client(address, EVE) as browser:
        asked = browser.get("/ui/sign-in?to=/ui/jobs").text
        offered = re.findall(r'name="key" value="(key_\w+)"', asked)
        answer = browser.post("/ui/sign-in/proxy", data={"key": eves[0], "to": "/ui/jobs"})
        page = browser.get("/ui/jobs")
        refused = browser.get("/ui/keys")

    assert "Eve@example.com" in asked
    assert sorted(offered) == sorted(eves)
    assert (answer.status_code, answer.headers["location"]) == (303, "/ui/jobs")
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert (page.status_code, refused.status_code) == (200, 403)
    with session_scope(api.engine) as session:
        noted = session.scalars(select(AuditRow.after).where(AuditRow.key_id == eves[0])).all()
    assert noted == [{"by": "proxy"}]


NOT_THE_PROXY = {
    "without the secret": [(HEADER, "eve@example.com")],
    "with another secret": [(HEADER, "eve@example.com"), ("X-Tunepool-Proxy-Secret", "t" * 32)],
    "with a name of the browser's beside the proxy's": [
        (HEADER, "eve@example.com"),
        (HEADER, "mallory@example.com"),
        ("X-Tunepool-Proxy-Secret", SECRET),
    ],
    "with two secrets": [
        (HEADER, "eve@example.com"),
        ("X-Tunepool-Proxy-Secret", SECRET),
        ("X-Tunepool-Proxy-Secret", SECRET),
    ],
    "without a name": [(HEADER, ""), ("X-Tunepool-Proxy-Secret", SECRET)],
}


@pytest.mark.parametrize("headers", NOT_THE_PROXY.values(), ids=NOT_THE_PROXY.keys())
def test_nobody_else_speaks_for_the_proxy(address: str, eves: tuple[str, str], headers: list[tuple[str, str]]) -> None:
    with client(address, headers) as browser:
        asked = browser.get("/ui/sign-in").text
        answer = browser.post("/ui/sign-in/proxy", data={"key": eves[0]})

    assert eves[0] not in asked
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers


def test_a_person_gets_no_key_of_another_name_and_no_ended_one(api: Api, address: str) -> None:
    with session_scope(api.engine) as session:
        others, _ = keys.create(session, project_id=api.caller.project_id, name="mallory@example.com")
        ended, _ = keys.create(session, project_id=api.caller.project_id, name="eve@example.com")
        keys.revoke(session, ended.id)
        wanted = (others.id, ended.id, "key_none")
    with client(address, EVE) as browser:
        asked = browser.get("/ui/sign-in").text
        answers = [browser.post("/ui/sign-in/proxy", data={"key": key}) for key in wanted]

    assert not any(key in asked for key in wanted)
    assert [answer.status_code for answer in answers] == [401, 401, 401]
    assert not any("set-cookie" in answer.headers for answer in answers)


def test_a_person_without_a_key_is_told_what_to_ask_for(address: str) -> None:
    with client(address, {**EVE, HEADER: "<b>new@example.com"}) as browser:
        asked = browser.get("/ui/sign-in").text

    assert "No API key stands for you yet" in asked
    assert "&lt;b&gt;new@example.com" in asked


def test_a_form_of_another_site_signs_nobody_in(address: str, eves: tuple[str, str]) -> None:
    with client(address, {**EVE, "Sec-Fetch-Site": "cross-site"}) as browser:
        answer = browser.post("/ui/sign-in/proxy", data={"key": eves[0]})

    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


def test_the_api_does_not_take_the_proxys_word(address: str, eves: tuple[str, str]) -> None:
    with client(address, EVE) as browser:
        assert browser.get("/v1/models").status_code == 401
        browser.post("/ui/sign-in/proxy", data={"key": eves[1]})
        assert browser.get("/v1/models").status_code == 401


def test_without_the_setting_the_header_says_nothing(api: Api, eves: tuple[str, str]) -> None:
    with client(api.url, {**EVE, "X-Tunepool-Proxy-Secret": ""}) as browser:
        assert eves[0] not in browser.get("/ui/sign-in").text
        assert browser.post("/ui/sign-in/proxy", data={"key": eves[0]}).status_code == 401


@pytest.mark.parametrize(("header", "secret"), [(HEADER, ""), ("", SECRET), (HEADER, "short")])
def test_an_api_with_half_a_proxy_does_not_start(api: Api, header: str, secret: str) -> None:
    half = {"page_proxy_header": header, "page_proxy_secret": SecretStr(secret)}

    with pytest.raises(ValueError, match="TUNEPOOL_PAGE_PROXY_SECRET"):
        create_app(api.settings.model_copy(update=half))


def test_a_header_that_is_none_is_no_setting() -> None:
    with pytest.raises(ValidationError):
        Settings(page_proxy_header="not a header")
