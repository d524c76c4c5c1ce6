"""Signing in to the page: what a cookie opens, what it never opens, and how it ends."""

from __future__ import annotations

from datetime import timedelta

import httpx2
import pytest
from sqlalchemy import func, update

from api.ui.page_headers import POLICY
from shared.store.db import session_scope
from shared.store.tables import ApiKeyRow, SignInRow
from tests.browsing import browser, proof_of
from tests.factories import make_key
from tests.integration.conftest import Api
from tests.live import live_api
from tests.patience import patience


def test_a_key_signs_in_and_the_cookie_is_out_of_reach_of_scripts_and_other_sites(api: Api) -> None:
    with httpx2.Client(base_url=api.url, timeout=patience(20)) as client:
        answer = client.post("/ui/sign-in", data={"key": f" {api.key} ", "to": "/ui/jobs?status=queued"})

    cookie = answer.headers["set-cookie"]
    assert answer.headers["location"] == "/ui/jobs?status=queued"
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Path=/ui" in cookie
    assert api.key not in cookie


def test_a_key_that_is_none_signs_nobody_in(api: Api) -> None:
    with httpx2.Client(base_url=api.url, timeout=patience(20)) as client:
        answer = client.post("/ui/sign-in", data={"key": "tp_<script>"})

    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers
    assert "<script>" not in answer.text.replace("<script defer", "")


@pytest.mark.parametrize(
    "to", ["https://evil.example", "//evil.example", "/ui\\evil", "/uix", "/v1/files", "/ui/sign-in"]
)
def test_a_sign_in_leads_to_our_own_pages_only(api: Api, to: str) -> None:
    with httpx2.Client(base_url=api.url, timeout=patience(20)) as client:
        assert client.post("/ui/sign-in", data={"key": api.key, "to": to}).headers["location"] == "/ui"


def test_without_a_sign_in_every_page_leads_to_it_and_back(api: Api) -> None:
    with httpx2.Client(base_url=api.url, timeout=patience(20)) as client:
        answer = client.get("/ui/jobs?status=failed")
        stream = client.get("/ui/live/pool", headers={"Accept": "text/event-stream"})

    assert answer.status_code == 303
    assert answer.headers["location"] == "/ui/sign-in?to=%2Fui%2Fjobs%3Fstatus%3Dfailed"
    assert stream.status_code == 401


def test_the_address_alone_leads_to_the_page(api: Api) -> None:
    with httpx2.Client(base_url=api.url, timeout=patience(20), follow_redirects=True) as client:
        answer = client.get("/")

    assert answer.url.path == "/ui/sign-in"
    assert "credentials.json" in answer.text


def test_a_link_from_another_site_is_asked_for_again_from_here(api: Api) -> None:
    with httpx2.Client(base_url=api.url, headers={"Sec-Fetch-Site": "cross-site"}, timeout=patience(20)) as client:
        first = client.get("/ui/jobs")
        again = client.get("/ui/jobs?came-from-elsewhere=1")

    assert 'http-equiv="refresh"' in first.text
    assert again.status_code == 303


def test_the_api_never_takes_the_cookie(api: Api) -> None:
    with browser(api.url, api.key) as client:
        token = client.cookies["tunepool_page"]
        for headers in ({"Cookie": f"tunepool_page={token}"}, {"Authorization": f"Bearer {token}"}):
            assert httpx2.get(f"{api.url}/v1/models", headers=headers, timeout=patience(20)).status_code == 401


@pytest.mark.parametrize("proof", [None, "", "0" * 64, "ä"])
def test_a_form_without_its_proof_does_nothing(api: Api, proof: str | None) -> None:
    with browser(api.url, api.key) as client:
        answer = client.post("/ui/sign-out", data={"everywhere": "yes"} | ({} if proof is None else {"proof": proof}))

        assert answer.status_code == 403
        assert client.get("/ui/account").status_code == 200


def test_the_proof_of_another_sign_in_is_none(api: Api) -> None:
    with browser(api.url, api.key) as mine, browser(api.url, api.key) as other:
        assert mine.post("/ui/sign-out", data={"proof": proof_of(other)}).status_code == 403


@pytest.mark.parametrize("headers", [{"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}])
def test_a_form_of_another_site_is_refused_whatever_it_knows(api: Api, headers: dict[str, str]) -> None:
    with browser(api.url, api.key) as client:
        assert client.post("/ui/sign-out", data={"proof": proof_of(client)}, headers=headers).status_code == 403
        assert client.post("/ui/sign-in", data={"key": api.key}, headers=headers).status_code == 403


def test_signing_out_ends_this_browser_only_and_everywhere_ends_all(api: Api) -> None:
    with browser(api.url, api.key) as first, browser(api.url, api.key) as second, browser(api.url, api.key) as third:
        first.post("/ui/sign-out", data={"proof": proof_of(first)})
        assert [client.get("/ui/account").status_code for client in (first, second)] == [303, 200]

        second.post("/ui/sign-out", data={"proof": proof_of(second), "everywhere": "yes"})
        assert third.get("/ui/account").status_code == 303


@pytest.mark.parametrize("column", ["seen_at", "created_at"])
def test_a_sign_in_ends_when_it_is_idle_and_when_it_is_old(api: Api, column: str) -> None:
    with browser(api.url, api.key) as client:
        long_ago = func.now() - timedelta(days=8)
        with session_scope(api.engine) as session:
            session.execute(update(SignInRow).values({column: long_ago}))

        assert client.get("/ui/account").status_code == 303


def test_a_revoked_key_ends_its_sign_ins_at_once(api: Api) -> None:
    with session_scope(api.engine) as session:
        caller, secret = make_key(session)
    with browser(api.url, secret) as client:
        with session_scope(api.engine) as session:
            session.execute(update(ApiKeyRow).where(ApiKeyRow.id == caller.key_id).values(revoked_at=func.now()))

        assert client.get("/ui/account").status_code == 303


def test_every_answer_says_what_a_page_may_load(api: Api) -> None:
    with browser(api.url, api.key) as client:
        answers = [
            client.get(path) for path in ("/ui/jobs", "/ui/nowhere", "/ui/sign-in", "/ui/files-of-the-page/page.js")
        ]

    for answer in answers:
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "strict-transport-security" not in answer.headers
    assert "unsafe" not in POLICY
    assert [answer.headers["cache-control"] for answer in answers[:3]] == ["no-store"] * 3
    assert "immutable" in answers[3].headers["cache-control"]


def test_behind_tls_the_cookie_is_for_tls_alone_and_browsers_are_told_to_stay_there(api: Api) -> None:
    behind = api.settings.model_copy(update={"public_url": "https://tunepool.example"})
    with live_api(behind) as url, httpx2.Client(base_url=url, timeout=patience(20)) as client:
        answer = client.post("/ui/sign-in", data={"key": api.key, "to": "/ui/jobs"})
        page = client.get("/ui/sign-in")

    assert "Secure" in answer.headers["set-cookie"]
    assert page.headers["strict-transport-security"].startswith("max-age=")


@pytest.mark.parametrize("path", ["/ui/live/pool", "/ui/live/jobs"])
def test_an_open_page_shows_nothing_more_once_its_browser_has_signed_out(api: Api, path: str) -> None:
    with browser(api.url, api.key) as client:
        proof = proof_of(client)
        patient = httpx2.Timeout(patience(30))
        with client.stream("GET", path, headers={"Accept": "text/event-stream"}, timeout=patient) as stream:
            lines = stream.iter_lines()
            next(lines)
            with httpx2.Client(base_url=api.url, cookies=client.cookies, timeout=patience(20)) as other_tab:
                assert other_tab.post("/ui/sign-out", data={"proof": proof}).status_code == 303

            assert sum(1 for _ in lines) < 100  # the stream itself would last a quarter of an hour
