"""Nobody asks, fails or keeps without bound: requests by key and project, bad keys by address, files by project."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
from openai import OpenAI
from sqlalchemy import Engine, func, select

from shared.settings import Settings
from shared.store.db import session_scope
from shared.store.tables import FileRow
from shared.tenants.rates import Rates
from standalone.valkey import EmbeddedValkey
from tests.factories import make_key
from tests.integration.conftest import Api
from tests.live import live_api
from tests.openai_types import held
from tests.patience import patience


@pytest.fixture(scope="module")
def small(
    engine: Engine, database_url: str, valkey_server: EmbeddedValkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Api]:
    """An API with limits that a test reaches."""
    settings = Settings(
        home=tmp_path_factory.mktemp("home"),
        database_url=database_url,
        redis_url=valkey_server.url,
        key_requests_per_minute=4,
        project_requests_per_minute=1000,
        failed_keys_per_minute=3,
        project_files=3,
        project_bytes=1000,
    )
    with session_scope(engine) as session:
        caller, key = make_key(session)
    with (
        live_api(settings) as url,
        OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=held()) as client,
    ):
        yield Api(url, caller, key, settings, engine, client)


@pytest.fixture
def fresh(small: Api) -> Api:
    """The same API, asked with a key of a project that has done nothing yet."""
    with session_scope(small.engine) as session:
        caller, key = make_key(session)
    return dataclasses.replace(small, caller=caller, key=key)


def upload(client: httpx2.Client, size: int) -> httpx2.Response:
    return client.post("/v1/files", files={"file": ("a.txt", b"x" * size)}, data={"purpose": "user_data"})


def test_a_key_that_asks_too_often_is_told_when_to_come_again(fresh: Api) -> None:
    with fresh.http() as client:
        answers = [client.get("/v1/models") for _ in range(5)]

    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 429]
    assert [answer.headers["x-ratelimit-limit-requests"] for answer in answers] == ["4"] * 5
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["3", "2", "1", "0", "0"]
    assert answers[0].headers["x-ratelimit-reset-requests"].endswith("s")
    error = answers[-1].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 15
    official = OpenAI(base_url=f"{fresh.url}/v1", api_key=fresh.key, max_retries=0, http_client=held())
    with official, pytest.raises(openai.RateLimitError):
        official.models.list()


def test_all_keys_of_a_project_share_its_limit_and_a_strangers_key_does_not(redis_url: str, fresh: Api) -> None:
    rates = Rates(Settings(redis_url=redis_url, key_requests_per_minute=1000, project_requests_per_minute=3))
    project = fresh.caller.project_id

    waits = [rates.admit(key_id=f"{project}-{number}", project_id=project) for number in range(4)]
    other = rates.admit(key_id=f"{project}-other", project_id=f"{project}-other")

    assert [standing is not None and standing.wait_seconds > 0 for standing in waits] == [False, False, False, True]
    assert other is not None
    assert other.wait_seconds == 0


def test_what_a_busy_key_owes_is_charged_with_its_next_look(redis_url: str, fresh: Api) -> None:
    now = [0.0]
    settings = Settings(redis_url=redis_url, key_requests_per_minute=1000, project_requests_per_minute=0)
    rates = Rates(settings, clock=lambda: now[0])
    asked = {"key_id": fresh.caller.key_id, "project_id": "p"}

    first = [rates.admit(**asked) for _ in range(100)]
    now[0] += 1
    rates.admit(**asked)
    elsewhere = Rates(settings).admit(**asked)

    assert [standing.left for standing in first if standing is not None] == list(range(999, 899, -1))
    assert elsewhere is not None
    assert elsewhere.left <= 900 + 1000 / 60 * patience(5)


def test_keys_that_are_none_are_slowed_down_and_good_ones_of_the_same_address_are_not(fresh: Api) -> None:
    with fresh.http("tp_nonsense") as client:
        answers = [client.get("/v1/models") for _ in range(5)]

    assert [answer.status_code for answer in answers] == [401, 401, 401, 429, 429]
    assert answers[-1].json()["error"]["code"] == "too_many_failed_keys"
    assert int(answers[-1].headers["retry-after"]) >= 1
    with fresh.http() as client:
        assert client.get("/v1/models").status_code == 200


def test_without_redis_nobody_is_counted_and_nobody_waits_for_it(fresh: Api) -> None:
    rates = Rates(Settings(redis_url="redis://127.0.0.1:1/0", key_requests_per_minute=1))

    assert [rates.admit(key_id="k", project_id="p") for _ in range(50)] == [None] * 50


def test_every_answer_says_whose_it_is_and_how_long_it_took(fresh: Api) -> None:
    with fresh.http() as client:
        answer = client.get("/v1/models")

    assert answer.headers["openai-organization"] == fresh.caller.organization_name
    assert int(answer.headers["openai-processing-ms"]) >= 0


def test_a_project_keeps_no_more_bytes_than_it_may_and_delete_makes_room(api: Api) -> None:
    with session_scope(api.engine) as session:
        _, key = make_key(session, max_bytes=1000)
    with api.http(key) as client:
        first = upload(client, 900)
        second = upload(client, 200)
        assert client.delete(f"/v1/files/{first.json()['id']}").status_code == 200
        third = upload(client, 200)

    assert (first.status_code, second.status_code, third.status_code) == (200, 429, 200)
    error = second.json()["error"]
    assert (error["code"], error["param"]) == ("quota_exceeded", "file")
    assert "1,000" in error["message"]
    assert second.headers["x-should-retry"] == "false"
    assert "retry-after" not in second.headers


def test_uploads_at_once_do_not_both_take_the_last_room(api: Api) -> None:
    with session_scope(api.engine) as session:
        caller, key = make_key(session, max_files=2)

    def one(_: int) -> int:
        with api.http(key) as client:
            return upload(client, 10).status_code

    with ThreadPoolExecutor(8) as pool:
        answers = sorted(pool.map(one, range(8)))

    assert answers == [200, 200, 429, 429, 429, 429, 429, 429]
    with session_scope(api.engine) as session:
        query = select(func.count()).select_from(FileRow).where(FileRow.project_id == caller.project_id)
        assert session.scalar(query) == 2


def test_what_was_refused_for_want_of_room_leaves_nothing_in_the_store(api: Api) -> None:
    with session_scope(api.engine) as session:
        caller, key = make_key(session, max_bytes=100)
    with api.http(key) as client:
        assert upload(client, 101).status_code == 429

    left = [path for path in (api.settings.home / "storage").rglob("*") if caller.project_id in str(path)]
    assert [path for path in left if path.is_file()] == []
