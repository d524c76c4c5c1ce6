"""Events as server-sent events: in order, without gap or double, whatever the client does."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import psycopg
import pytest
from sqlalchemy import event as database_event

from api.app import create_app
from shared.jobs import moves
from shared.lease import journal
from shared.lease.journal import NewEvent
from shared.store.db import session_scope
from shared.store.locks import one_at_a_time
from standalone.postgres import EmbeddedPostgres
from tests.factories import make_job
from tests.integration.conftest import Api
from tests.integration.test_bad_requests import refused
from tests.lifecycle.stack import until
from tests.live import live_api, served
from tests.patience import patience


@dataclass(frozen=True)
class Heard:
    """One block of a stream."""

    id: str | None
    event: str | None
    data: Any


def blocks(answer: httpx2.Response) -> Iterator[Heard]:
    """Events of an open answer, as an EventSource would read them; comments and `retry` are left out."""
    fields: dict[str, str] = {}
    for line in answer.iter_lines():
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        else:
            if "data" in fields:
                yield Heard(fields.get("id"), fields.get("event"), json.loads(fields["data"]))
            fields = {}


def path(job_id: str) -> str:
    return f"/v1/tunepool/jobs/{job_id}/events/stream"


@contextmanager
def stream(api: Api, job_id: str, *, url: str | None = None, **headers: str) -> Iterator[Iterator[Heard]]:
    with (
        httpx2.Client(
            base_url=url or api.url, headers={"Authorization": f"Bearer {api.key}", **headers}, timeout=patience(20)
        ) as http,
        http.stream("GET", path(job_id), timeout=patience(20)) as answer,
    ):
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield blocks(answer)


def new_job(api: Api) -> str:
    """A fresh job: it has two events."""
    with session_scope(api.engine) as session:
        return make_job(session, api.caller).id


def tell(api: Api, job_id: str, count: int = 1) -> None:
    with session_scope(api.engine) as session:
        one_at_a_time(session, job_id)
        journal.append(session, job_id, [NewEvent(f"line\n{number}: ü") for number in range(count)])


def cancel(api: Api, job_id: str) -> None:
    with session_scope(api.engine) as session:
        moves.request_cancel(session, job_id, project_id=api.caller.project_id)


def test_a_stream_replays_what_was_follows_what_comes_and_ends_with_the_job(api: Api) -> None:
    job_id = new_job(api)

    with stream(api, job_id) as heard:
        past = [next(heard), next(heard)]
        tell(api, job_id, 2)
        present = [next(heard), next(heard)]
        cancel(api, job_id)
        rest = list(heard)

    assert [one.id for one in past + present + rest] == ["1", "2", "3", "4", "5", None]
    assert rest[-1] == Heard(None, "end", {"status": "cancelled"})
    listed = api.openai().fine_tuning.jobs.list_events(job_id, limit=100).data[::-1]
    assert [one.data for one in past + present + rest[:-1]] == [one.model_dump(mode="json") for one in listed]


def test_a_client_that_comes_again_misses_nothing_and_gets_nothing_twice(api: Api) -> None:
    job_id = new_job(api)
    tell(api, job_id, 500)  # more than a page, far more than what is kept
    cancel(api, job_id)
    chance, seen = random.Random(7), [0]

    while seen[-1] < 503:
        with stream(api, job_id, **({"Last-Event-ID": str(seen[-1])} if seen[1:] else {})) as heard:
            for _, one in zip(range(chance.randint(1, 90)), heard, strict=False):
                if one.id is not None:
                    seen.append(int(one.id))

    assert seen == list(range(504))


def test_many_clients_of_a_busy_job_each_get_every_event_once(api: Api) -> None:
    job_id = new_job(api)
    heard: list[list[str | None]] = [[] for _ in range(20)]

    def listen(number: int) -> None:
        time.sleep(number * 0.05)
        with stream(api, job_id) as blocks_heard:
            heard[number] = [one.id for one in blocks_heard]

    threads = [threading.Thread(target=listen, args=(number,)) for number in range(len(heard))]
    for thread in threads:
        thread.start()
    for _ in range(40):
        tell(api, job_id, 5)
        time.sleep(0.04)
    cancel(api, job_id)
    for thread in threads:
        thread.join(patience(20))

    expected = [*(str(number) for number in range(1, 204)), None]
    assert all(one == expected for one in heard)


def test_an_ended_job_is_told_and_the_stream_ends_at_once(api: Api) -> None:
    job_id = new_job(api)
    cancel(api, job_id)

    with stream(api, job_id, **{"Last-Event-ID": "3"}) as heard:
        assert list(heard) == [Heard(None, "end", {"status": "cancelled"})]


@pytest.mark.parametrize("value", ["", "x", "-1", "1.0", "01", "+1", "1 2", "9" * 19, "3", "ftevent-1", "1e3", "²"])
def test_a_last_event_id_that_no_stream_gave_is_refused_in_the_envelope(api: Api, value: str) -> None:
    with api.http() as http:
        answer = http.get(path(new_job(api)), headers={b"Last-Event-ID": value.encode()})

    assert refused(api, answer)["param"] == "Last-Event-ID"


def test_another_projects_job_does_not_exist_and_a_key_is_needed(api: Api, stranger: str) -> None:
    job_id = new_job(api)

    with api.http(stranger) as http:
        refused(api, http.get(path(job_id)), status=404)
        refused(api, http.get(path("ftjob-none")), status=404)
    refused(api, httpx2.get(api.url + path(job_id), timeout=patience(20)), status=401)


def test_a_stream_ends_after_its_time_and_its_client_goes_on_where_it_was(api: Api) -> None:
    job_id, ids = new_job(api), []
    with live_api(api.settings.model_copy(update={"stream_seconds": 0.4})) as url:
        for wanted in (2, 3):
            while len(ids) < wanted:  # on a busy machine a stream may end before it has told anything
                last = {"Last-Event-ID": ids[-1]} if ids else {}
                with stream(api, job_id, url=url, **last) as heard:
                    ids += [one.id for one in heard]
            if wanted == 2:
                tell(api, job_id)

    assert ids == ["1", "2", "3"]


def test_streams_have_a_limit_and_one_that_closes_makes_room(api: Api) -> None:
    job_id = new_job(api)
    with live_api(api.settings.model_copy(update={"max_streams": 1})) as url:
        with stream(api, job_id, url=url) as heard:
            next(heard)
            answer = httpx2.get(
                url + path(job_id), headers={"Authorization": f"Bearer {api.key}"}, timeout=patience(20)
            )
            assert refused(api, answer, status=429)["code"] == "too_many_streams"
        cancel(api, job_id)
        deadline = time.monotonic() + patience(10)
        while (
            answer := httpx2.get(
                url + path(job_id), headers={"Authorization": f"Bearer {api.key}"}, timeout=patience(20)
            )
        ).is_error:
            assert time.monotonic() < deadline

    assert "event: end" in answer.text


def test_a_stream_outlives_a_database_that_goes_away_and_then_goes_on(
    api: Api, postgres_server: EmbeddedPostgres
) -> None:
    job_id = new_job(api)
    where = f"host={postgres_server.socket_dir} user=postgres dbname=postgres"
    name = api.engine.url.database

    with stream(api, job_id) as heard, psycopg.connect(where, autocommit=True) as admin:
        past = [next(heard).id, next(heard).id]
        admin.execute(f"alter database {name} with allow_connections false")
        admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (name,))
        time.sleep(1.5)
        admin.execute(f"alter database {name} with allow_connections true")
        api.engine.dispose()
        tell(api, job_id)
        present = next(heard).id

    assert (past, present) == (["1", "2"], "3")


def test_quiet_streams_share_one_query_and_hold_no_connection(api: Api) -> None:
    app = create_app(api.settings)
    engine = app.state.door.engine
    jobs = [new_job(api) for _ in range(25)]
    asked: list[str] = []
    database_event.listen(engine, "before_cursor_execute", lambda *call: asked.append(str(call[3])))

    def quiet() -> bool:
        """Whether the last four statements each asked for all jobs: a stream that asks for itself never lets it be."""
        return len(asked) >= 4 and all(job in words for words in asked[-4:] for job in jobs)

    with served(app) as url:
        opened = [stream(api, job, url=url) for job in jobs]
        heard = [one.__enter__() for one in opened]
        for one in heard:
            next(one)
        until(quiet, what="one query for all streams, again and again")
        held = engine.pool.checkedout()
        for one in opened:
            one.__exit__(None, None, None)
        until(lambda: not app.state.door.streams.open, what="the end of all streams")

    assert held <= 1
