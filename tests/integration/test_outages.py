"""What clients see while a part of the service is away, and what a lost client leaves behind."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog
from fastapi.testclient import TestClient
from sqlalchemy import text
from sqlalchemy.orm import Session

from api.app import create_app
from shared.settings import Settings
from shared.store import bell as bell_module
from shared.store import db
from shared.store.bell import Bell
from shared.store.db import session_scope
from shared.store.storage import open_store
from standalone.valkey import EmbeddedValkey
from tests.factories import make_file
from tests.integration.conftest import Api
from tests.integration.test_bad_requests import refused
from tests.integration.test_bad_uploads import BOUNDARY, FILE, PURPOSE, TYPE, form, part, traces
from tests.live import live_api
from tests.patience import patience

JOBS = "/v1/fine_tuning/jobs"
# Nothing listens on port 1 of loopback: connecting fails at once.
NOWHERE = "127.0.0.1:1"


@contextmanager
def away(api: Api, **settings: Any) -> Iterator[TestClient]:
    """The same API with one part replaced by an address where nothing answers."""
    app = create_app(api.settings.model_copy(update=settings))
    with TestClient(app, headers={"Authorization": f"Bearer {api.key}"}, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def body(api: Api) -> dict[str, str]:
    with session_scope(api.engine) as session:
        return {"model": "smollm2-135m-instruct", "training_file": make_file(session, api.caller).id}


def test_without_postgres_every_answer_says_retry_and_names_no_address(api: Api) -> None:
    with away(api, database_url=f"postgresql+psycopg://nobody@{NOWHERE}/nothing") as client:
        answers = [client.get(path) for path in ("/v1/models", JOBS, "/readyz")]
        alive = client.get("/livez")

    for answer in answers:
        error = refused(api, answer, status=503)  # type: ignore[arg-type]
        assert (error["type"], error["code"]) == ("server_error", "database_unavailable")
        assert int(answer.headers["retry-after"]) > 0
        assert "127.0.0.1" not in answer.text
    assert alive.status_code == 200


def end_all_connections(session: Session) -> None:
    session.execute(
        text(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where pid <> pg_backend_pid() and datname = current_database() and backend_type = 'client backend'"
        )
    )


def test_connections_that_the_server_has_ended_cost_no_request(api: Api) -> None:
    key = {"Authorization": f"Bearer {api.key}"}
    with live_api(api.settings) as url, httpx2.Client(base_url=url, headers=key, timeout=patience(20)) as http:
        assert http.get(JOBS).status_code == 200
        with session_scope(api.engine) as session:
            end_all_connections(session)
        answers = [http.get(JOBS).status_code for _ in range(5)]

    assert answers == [200] * 5


def test_a_connection_that_died_without_a_word_is_found_once_it_has_rested(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "RESTED_SECONDS", 0.0)
    monkeypatch.setattr(db, "_has_spoken", lambda _: False)
    engine = db.make_engine(api.settings.database_url)
    with session_scope(engine) as session:
        first = session.scalar(text("select pg_backend_pid()"))
    with session_scope(api.engine) as session:
        end_all_connections(session)

    with session_scope(engine) as session:
        second = session.scalar(text("select pg_backend_pid()"))
    engine.dispose()

    assert first != second


def test_without_its_store_an_upload_leaves_no_row_and_jobs_are_still_answered(api: Api) -> None:
    before = traces(api)

    with away(api, storage_url="s3://nothing", storage_endpoint=f"http://{NOWHERE}") as client:
        upload = client.post("/v1/files", content=form(PURPOSE, FILE), headers=TYPE)
        jobs, ready = client.get(JOBS), client.get("/readyz")

    assert refused(api, upload, status=503)["code"] == "object_store"  # type: ignore[arg-type]
    assert NOWHERE not in upload.text
    assert traces(api) == before
    assert jobs.status_code == 200
    assert refused(api, ready, status=503)["code"] == "object_store"  # type: ignore[arg-type]


def test_a_file_is_deleted_although_the_store_is_away(api: Api) -> None:
    with session_scope(api.engine) as session:
        file_id = make_file(session, api.caller).id

    with away(api, storage_url="s3://nothing", storage_endpoint=f"http://{NOWHERE}") as client:
        assert client.delete(f"/v1/files/{file_id}").json()["deleted"]
        assert client.get(f"/v1/files/{file_id}").status_code == 404


def test_a_fault_of_ours_is_a_500_in_the_envelope_with_the_id_to_quote(api: Api) -> None:
    app = create_app(api.settings)

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("secret detail")

    with structlog.testing.capture_logs():
        answer = TestClient(app, raise_server_exceptions=False).get("/broken")

    error = refused(api, answer, status=500)  # type: ignore[arg-type]
    assert (error["type"], error["code"]) == ("server_error", "server_error")
    assert answer.headers["x-request-id"] in error["message"]
    assert "secret detail" not in answer.text


@pytest.fixture
def frozen_redis(tmp_path: Path) -> Iterator[str]:
    """A real server that accepts connections and answers nothing."""
    server = EmbeddedValkey(tmp_path / "valkey")
    server.start()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    yield server.url
    os.kill(server.pid, signal.SIGCONT)
    server.stop()


@pytest.mark.slow
def test_a_frozen_redis_costs_no_submission_anything(api: Api, body: dict[str, str], frozen_redis: str) -> None:
    ring_seconds = patience(2)
    with live_with_redis(api, frozen_redis, ring_seconds=ring_seconds) as http:
        taken = [timed_submission(http, body) for _ in range(3)]
        state = http.get("/readyz").json()["redis"]

    # Each of these three rings takes as long as it may, and no request waits for it.
    assert min(taken) < ring_seconds
    assert state == "away"


def test_a_frozen_redis_is_asked_three_times_each_within_its_budget_and_then_left_alone(
    frozen_redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bell_module, "BREAKER_SECONDS", 3600.0)
    bell, taken = Bell(Settings(redis_url=frozen_redis)), []
    send = bell._app.send_task

    def timed(*words: Any, **options: Any) -> None:
        begun = time.monotonic()
        try:
            send(*words, **options)
        finally:
            taken.append(time.monotonic() - begun)

    monkeypatch.setattr(bell._app, "send_task", timed)

    assert [bell.ring("cpu") for _ in range(5)] == [False] * 5
    assert len(taken) == 3, "the breaker is open: nobody asks any more"
    assert min(taken) >= 0.2
    assert min(taken) < patience(2)  # without the budget kombu takes 6 s and more


def test_a_redis_that_is_down_costs_a_submission_nothing(api: Api, body: dict[str, str]) -> None:
    with live_with_redis(api, f"redis://{NOWHERE}/0") as http:
        assert min(timed_submission(http, body) for _ in range(3)) < patience(1)
        assert http.get("/readyz").json()["redis"] == "away"


@contextmanager
def live_with_redis(api: Api, redis_url: str, **settings: float) -> Iterator[httpx2.Client]:
    key = {"Authorization": f"Bearer {api.key}"}
    with (
        live_api(api.settings.model_copy(update={"redis_url": redis_url, **settings})) as url,
        httpx2.Client(base_url=url, headers=key, timeout=patience(30)) as http,
    ):
        yield http


def timed_submission(http: httpx2.Client, body: dict[str, str]) -> float:
    begun = time.monotonic()
    assert http.post(JOBS, json=body).status_code == 200
    return time.monotonic() - begun


def test_readiness_tells_of_a_redis_that_answers_and_of_none(api: Api, redis_url: str) -> None:
    with away(api, redis_url=redis_url) as with_redis, away(api) as without:
        assert with_redis.get("/readyz").json()["redis"] == "ok"
        assert without.get("/readyz").json()["redis"] == "none"


def test_a_client_that_leaves_in_the_middle_of_an_upload_leaves_nothing_and_is_no_fault_of_ours(api: Api) -> None:
    before = traces(api)
    host, port = api.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.key}\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\nContent-Length: 100000000\r\n\r\n"
    )
    with structlog.testing.capture_logs() as logs:
        with socket.create_connection((host, int(port))) as client:
            client.sendall(head.encode() + part("file", b"x" * 3_000_000, "big.jsonl"))
        deadline = time.monotonic() + patience(10)
        while not any(line["event"] == "client.gone" for line in logs) and time.monotonic() < deadline:
            time.sleep(0.02)

    assert [(line["event"], line["log_level"]) for line in logs] == [("client.gone", "info")]
    assert traces(api) == before
    assert not [path for path in storage_folder(api.settings).rglob("*") if path.is_file() and "#" in path.name]


def storage_folder(settings: Settings) -> Path:
    open_store(settings)
    return Path(settings.storage.removeprefix("file://"))
