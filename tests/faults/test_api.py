"""The API while its database fails, and clients that repeat themselves (faults 21, 22, 27)."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from shared.store.tables import JobRow
from tests.faults.conftest import api_process, make_secret, postgres_admin
from tests.lifecycle.stack import Stack
from tests.patience import patience

JOBS = "/v1/fine_tuning/jobs"


def body(stack: Stack) -> dict[str, str]:
    return {"model": "tiny", "training_file": stack.upload(b'{"text": "fake: steps=2"}\n' * 12)}


def test_whoever_is_told_of_a_job_has_one_though_connections_are_cut_all_the_time(own_stack: Stack) -> None:
    job, told = body(own_stack), {}
    with api_process(own_stack) as url, httpx2.Client(base_url=url, timeout=patience(30)) as http:
        http.headers["Authorization"] = f"Bearer {make_secret(own_stack)}"
        for number in range(60):
            if number % 2:
                with postgres_admin(own_stack.servers.postgres) as admin:
                    admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()"
                                  " and datname is not null")  # fmt: skip
            answer = http.post(JOBS, json=job, headers={"Idempotency-Key": f"key-{number}"})
            assert answer.status_code in (200, 503), answer.text
            if answer.status_code == 503:
                assert "Retry-After" in answer.headers
            else:
                told[number] = answer.json()["id"]

    own_stack.engine.dispose()
    with Session(own_stack.engine) as session:
        kept = set(session.scalars(select(JobRow.id)))
    assert len(told) > 30
    assert kept >= set(told.values())


def test_a_database_that_is_locked_is_answered_with_503_and_no_request_hangs(stack: Stack) -> None:
    job = body(stack)
    headers = {"Authorization": f"Bearer {make_secret(stack)}"}
    with api_process(stack) as url, httpx2.Client(base_url=url, timeout=patience(60), headers=headers) as http:

        def ask(number: int) -> tuple[int, float]:
            began = time.monotonic()
            status = http.post(JOBS, json=job, headers={"Idempotency-Key": f"key-{number}"}).status_code
            return status, time.monotonic() - began

        with stack.engine.connect() as blocker, ThreadPoolExecutor(60) as crowd:
            blocker.execute(text("lock table jobs in access exclusive mode"))
            answers = list(crowd.map(ask, range(60)))  # twice as many as the API has connections
            blocker.rollback()
        assert {status for status, _ in answers} == {503}
        # 5 s for a lock, 5 s for a connection, and as much again for a busy machine.
        assert max(seconds for _, seconds in answers) < patience(20)
        assert ask(0)[0] == 200


def test_fifty_times_the_same_key_at_once_is_one_job(stack: Stack) -> None:
    job = body(stack)
    headers = {"Authorization": f"Bearer {make_secret(stack)}", "Idempotency-Key": "once-only"}
    with (
        api_process(stack) as url,
        httpx2.Client(base_url=url, timeout=patience(60), headers=headers) as http,
        ThreadPoolExecutor(50) as crowd,
    ):
        answers = list(crowd.map(lambda _: http.post(JOBS, json=job), range(50)))

    assert {answer.status_code for answer in answers} <= {200, 409}
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 200}) == 1
    with Session(stack.engine) as session:
        assert len(session.scalars(select(JobRow.id)).all()) == 1
