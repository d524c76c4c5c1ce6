"""Webhooks: told in the transaction that ends the job, signed, in order, again until taken; and nobody else's."""

from __future__ import annotations

import base64
import dataclasses
import http.server
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session
from tunepool.main import cli
from typer.testing import CliRunner

from shared.chores import deliveries
from shared.chores.deliveries import Delivery, SendResult
from shared.errors import Invalid
from shared.jobs import moves
from shared.operating import census
from shared.settings import Settings
from shared.store.db import session_scope
from shared.store.tables import DeliveryRow, WebhookRow, WorkerRow
from shared.tenants import keys
from shared.tenants.secret_box import SecretBox
from tests.factories import claim_on, make_job, make_key, make_queued_job, make_worker
from tests.integration.conftest import Api
from tests.integration.test_bad_requests import refused
from tests.live import live_api
from tests.openai_types import held
from worker.chores import sending

WEBHOOKS = "/v1/tunepool/webhooks"
ALL = ["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]


def new_key() -> str:
    return base64.urlsafe_b64encode(os.urandom(32)).decode()


@pytest.fixture(scope="module")
def secret_api(api: Api) -> Iterator[Api]:
    """The same API with a key for secrets, and with the loopback allowed."""
    settings = api.settings.model_copy(
        update={"secrets_key": type(api.settings.secrets_key)(new_key()), "webhook_networks": "127.0.0.0/8"}
    )
    with live_api(settings) as url, OpenAI(base_url=f"{url}/v1", api_key=api.key, http_client=held()) as client:
        yield dataclasses.replace(api, url=url, settings=settings, client=client)


@pytest.fixture
def http_(secret_api: Api) -> Iterator[httpx2.Client]:
    """A project of its own for each test."""
    with session_scope(secret_api.engine) as session:
        _, key = make_key(session)
    with secret_api.http(key) as client:
        client.key = key  # type: ignore[attr-defined]
        yield client
        for webhook in client.get(WEBHOOKS).json()["data"]:
            client.delete(f"{WEBHOOKS}/{webhook['id']}")  # nothing waits for the tests that follow


def created(http: httpx2.Client, url: str = "http://127.0.0.1:9/hook", **values: object) -> dict[str, Any]:
    answer = http.post(WEBHOOKS, json={"name": "ci", "url": url, "event_types": ALL, **values})
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


def cancelled(api: Api, http: httpx2.Client) -> str:
    """A job of the client's project that was cancelled while it waited."""
    with session_scope(api.engine) as session:
        caller = keys.authenticate(session, http.key)  # type: ignore[attr-defined]
        job = make_job(session, caller)
        moves.request_cancel(session, job.id, project_id=caller.project_id)
    return job.id


def claim(api: Api) -> Delivery | None:
    with session_scope(api.engine) as session:
        return deliveries.claim(session, worker_id="worker_1", lease_seconds=60)


def finish(api: Api, due: Delivery, outcome: SendResult) -> bool:
    with session_scope(api.engine) as session:
        return deliveries.finish(session, due, outcome)


def now(api: Api, webhook_id: str) -> None:
    """Nothing waits for its time any more."""
    with session_scope(api.engine) as session:
        session.execute(update(WebhookRow).where(WebhookRow.id == webhook_id).values(rests_until=None))
        session.execute(
            update(DeliveryRow)
            .where(DeliveryRow.webhook_id == webhook_id, DeliveryRow.lease_owner.is_(None))
            .values(lease_until=None)
        )


@contextmanager
def receiver(status: int = 200) -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    heard: list[tuple[dict[str, str], bytes]] = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *words: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/hook", heard
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_official_client_accepts_what_is_sent_when_a_job_ends(secret_api: Api, http_: httpx2.Client) -> None:
    with receiver() as (url, heard):
        secret = created(http_, url)["signing_secret"]
        job_id = cancelled(secret_api, http_)
        due = claim(secret_api)
        assert due is not None
        assert finish(secret_api, due, sending.send(due, secret_api.settings))

    ((headers, body),) = heard
    event = secret_api.client.webhooks.unwrap(body, headers, secret=secret)
    assert event.type == "fine_tuning.job.cancelled"
    assert json.loads(body) == {
        "id": event.id,
        "object": "event",
        "created_at": event.created_at,
        "type": "fine_tuning.job.cancelled",
        "data": {"id": job_id},
    }
    assert headers["webhook-id"] == event.id
    with pytest.raises(openai.InvalidWebhookSignatureError):
        secret_api.client.webhooks.unwrap(body + b" ", headers, secret=secret)


def test_every_end_of_a_job_is_told_and_only_to_whoever_listens(secret_api: Api, http_: httpx2.Client) -> None:
    all_of_them, failures = created(http_), created(http_, event_types=["fine_tuning.job.failed"])
    other = cancelled(secret_api, http_)
    ended = {}
    with session_scope(secret_api.engine) as session:
        caller = keys.authenticate(session, http_.key)  # type: ignore[attr-defined]
        worker = session.scalars(select(WorkerRow)).first() or make_worker(session)
        for _ in range(2):
            job = make_queued_job(session, caller)
            lease = claim_of(session, worker, job.id)
            if not ended:
                assert moves.succeed(session, lease, manifest={"prefix": "p", "files": []})
                ended[job.id] = "fine_tuning.job.succeeded"
            else:
                assert moves.fail(session, lease, code="crashed", message="It crashed.")
                ended[job.id] = "fine_tuning.job.failed"

    told = {row["job_id"]: row["event_type"] for row in listed(http_, all_of_them["id"])}
    assert told == {**ended, other: "fine_tuning.job.cancelled"}
    assert [row["event_type"] for row in listed(http_, failures["id"])] == ["fine_tuning.job.failed"]
    created_later = created(http_)
    assert listed(http_, created_later["id"]) == []


def claim_of(session: Session, worker: WorkerRow, job_id: str) -> Any:
    got = claim_on(session, worker)
    assert got is not None
    assert got.lease.id == job_id
    return got.lease


def listed(client: httpx2.Client, webhook_id: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = client.get(f"{WEBHOOKS}/{webhook_id}/deliveries").json()["data"]
    return rows


def test_a_job_that_did_not_end_after_all_is_told_to_nobody(secret_api: Api, http_: httpx2.Client) -> None:
    webhook = created(http_)
    with Session(secret_api.engine) as session:
        caller = keys.authenticate(session, http_.key)  # type: ignore[attr-defined]
        moves.request_cancel(session, make_job(session, caller).id, project_id=caller.project_id)
        session.rollback()

    assert listed(http_, webhook["id"]) == []


def test_what_is_not_taken_is_sent_again_later_with_the_same_id(secret_api: Api, http_: httpx2.Client) -> None:
    webhook = created(http_)
    cancelled(secret_api, http_)
    first = claim(secret_api)
    assert first is not None
    assert finish(secret_api, first, SendResult(500, 0.1, "It answered 500."))
    assert claim(secret_api) is None

    now(secret_api, webhook["id"])
    again = claim(secret_api)
    assert again is not None
    assert (again.event_id, again.body, again.tries) == (first.event_id, first.body, 1)
    assert finish(secret_api, again, SendResult(200, 0.1))
    assert not finish(secret_api, first, SendResult(200, 0.1)), "a late sender writes nothing"
    (row,) = listed(http_, webhook["id"])
    assert (row["state"], row["tries"]) == ("delivered", 2)
    assert [entry["status"] for entry in row["log"]] == [500, 200]
    assert http_.get(f"{WEBHOOKS}/{webhook['id']}").json()["failing_since"] is None


def test_the_waits_grow_to_hours_and_are_spread() -> None:
    waits = [[deliveries.wait_seconds(tries) for _ in range(50)] for tries in range(30)]

    assert all(4 <= wait <= 6 for wait in waits[0])
    assert all(min(later) > 0.8 * min(earlier) for earlier, later in pairwise(waits))
    assert max(waits[-1]) <= 28800 * 1.2
    assert len(set(waits[0])) > 1
    assert sum(min(wait) for wait in waits[:20]) < timedelta(days=5).total_seconds()


def test_events_of_one_job_go_out_in_order_and_other_jobs_do_not_wait(secret_api: Api, http_: httpx2.Client) -> None:
    webhook = created(http_)
    job_id = cancelled(secret_api, http_)
    with session_scope(secret_api.engine) as session:
        earlier = session.scalars(select(DeliveryRow).where(DeliveryRow.webhook_id == webhook["id"])).one()
        later = DeliveryRow(
            id=earlier.id[:-1] + "z",
            project_id=earlier.project_id,
            webhook_id=webhook["id"],
            event_id="evt_later",
            event_type=ALL[0],
            job_id=job_id,
        )
        session.add(later)
    cancelled(secret_api, http_)

    first, second = claim(secret_api), claim(secret_api)
    assert first is not None
    assert second is not None
    assert job_id in first.body
    assert job_id not in second.body  # the other job's
    assert claim(secret_api) is None
    assert finish(secret_api, first, SendResult(200, 0.1))
    third = claim(secret_api)
    assert third is not None
    assert third.event_id == "evt_later"
    finish(secret_api, second, SendResult(200, 0.1))
    finish(secret_api, third, SendResult(200, 0.1))


@pytest.mark.parametrize(
    "outcome", [SendResult(410, 0.1, "It answered 410."), SendResult(None, 0.1, "It did not answer.")]
)
def test_a_dead_webhook_is_disabled_with_the_reason_and_what_waits_may_be_replayed(
    secret_api: Api, http_: httpx2.Client, outcome: SendResult
) -> None:
    webhook = created(http_)
    cancelled(secret_api, http_)
    cancelled(secret_api, http_)
    due = claim(secret_api)
    assert due is not None
    long_ago = func.now() - deliveries.GIVEN_UP_AFTER * 1.01
    with session_scope(secret_api.engine) as session:
        session.execute(update(WebhookRow).where(WebhookRow.id == webhook["id"]).values(failing_since=long_ago))
        session.execute(update(DeliveryRow).where(DeliveryRow.id == due.lease.id).values(created_at=long_ago))
    assert finish(secret_api, due, outcome)

    view = http_.get(f"{WEBHOOKS}/{webhook['id']}").json()
    assert view["enabled"] is False
    assert ("410" if outcome.status else "three days") in view["disabled_reason"]
    rows = listed(http_, webhook["id"])
    assert [row["state"] for row in rows] == ["failed", "failed"]
    cancelled(secret_api, http_)
    assert len(listed(http_, webhook["id"])) == 2
    replay = f"{WEBHOOKS}/{webhook['id']}/deliveries/{rows[0]['id']}/replay"
    refusal = http_.post(replay)
    assert (refusal.status_code, refusal.headers["x-should-retry"]) == (409, "false")
    assert refusal.json()["error"]["code"] == "webhook_disabled"

    assert http_.post(f"{WEBHOOKS}/{webhook['id']}/enable").json()["disabled_reason"] is None
    replayed = http_.post(replay).json()
    assert (replayed["event_id"], replayed["state"]) == (rows[0]["event_id"], "waiting")
    again = claim(secret_api)
    assert again is not None
    assert rows[0]["job_id"] in again.body
    finish(secret_api, again, SendResult(200, 0.1))


def test_after_a_rotation_both_secrets_sign_for_a_day_if_asked(secret_api: Api, http_: httpx2.Client) -> None:
    made = created(http_)
    where = f"{WEBHOOKS}/{made['id']}"
    rotated = http_.post(f"{where}/rotate", json={"keep_old_secret_active_for_24_hours": True}).json()
    assert http_.post(f"{where}/test", json={"event_type": ALL[0]}).json()["state"] == "waiting"
    due = claim(secret_api)
    assert due is not None

    headers = sending.signed(due, SecretBox(secret_api.settings), at=datetime.now(UTC))
    for secret in (made["signing_secret"], rotated["signing_secret"]):
        event = secret_api.client.webhooks.unwrap(due.body, headers, secret=secret)
        assert event.data.id == "ftjob-test"
    finish(secret_api, due, SendResult(200, 0.1))

    http_.post(f"{where}/rotate", json={})
    http_.post(f"{where}/test", json={"event_type": ALL[0]})
    due = claim(secret_api)
    assert due is not None
    assert len(due.secrets) == 1
    finish(secret_api, due, SendResult(200, 0.1))


def test_a_rich_body_says_how_the_job_ended_and_the_official_client_takes_it(
    secret_api: Api, http_: httpx2.Client
) -> None:
    secret = created(http_, rich=True)["signing_secret"]
    cancelled(secret_api, http_)
    due = claim(secret_api)
    assert due is not None

    headers = sending.signed(due, SecretBox(secret_api.settings), at=datetime.now(UTC))
    assert secret_api.client.webhooks.unwrap(due.body, headers, secret=secret).type == ALL[2]
    extension = json.loads(due.body)["data"]["tunepool"]
    assert (extension["status"], extension["fine_tuned_model"]) == ("cancelled", None)
    assert extension["finished_at"] > 0
    finish(secret_api, due, SendResult(200, 0.1))


def test_a_secret_is_shown_once_and_stored_encrypted(secret_api: Api, http_: httpx2.Client) -> None:
    made = created(http_)

    shown = http_.get(WEBHOOKS).text + http_.get(f"{WEBHOOKS}/{made['id']}").text
    with session_scope(secret_api.engine) as session:
        row = session.get_one(WebhookRow, made["id"])
        stored = json.dumps({name: str(value) for name, value in vars(row).items()})
    secret = made["signing_secret"]
    assert secret.startswith("whsec_")
    assert secret[6:] not in shown + stored
    assert made["signing_secret_hint"] == secret[-4:]
    with pytest.raises(Invalid) as wrong:
        SecretBox(Settings(secrets_key=new_key())).open(row.secret)  # type: ignore[arg-type]
    assert wrong.value.code == "secrets_key_wrong"
    former = secret_api.settings.secrets_key.get_secret_value()
    both = Settings(secrets_key=f"{new_key()},{former}")  # type: ignore[arg-type]
    assert SecretBox(both).open(row.secret) == secret


def test_without_a_key_for_secrets_webhooks_are_refused_by_name(api: Api) -> None:
    with api.http() as http:
        answer = http.post(WEBHOOKS, json={"name": "ci", "url": "https://example.com/", "event_types": ALL})

    error = refused(api, answer, status=400)
    assert error["code"] == "secrets_key_missing"
    assert "TUNEPOOL_SECRETS_KEY" in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"url": "https://10.0.0.1/hook"}, "url"),
        ({"url": "https://169.254.169.254/latest/meta-data"}, "url"),
        ({"url": "file:///etc/passwd"}, "url"),
        ({"event_types": []}, "event_types"),
        ({"event_types": ["batch.completed"]}, "event_types.0"),
        ({"name": ""}, "name"),
        ({"secret": "mine"}, "secret"),
    ],
)
def test_a_bad_webhook_is_refused_by_field(
    secret_api: Api, http_: httpx2.Client, body: dict[str, Any], param: str
) -> None:
    whole = {"name": "ci", "url": "https://example.com/", "event_types": ALL, **body}

    assert refused(secret_api, http_.post(WEBHOOKS, json=whole), status=400)["param"] == param


def test_a_webhook_is_changed_disabled_and_deleted(http_: httpx2.Client) -> None:
    made = created(http_)
    where = f"{WEBHOOKS}/{made['id']}"

    edited = http_.patch(where, json={"name": "other", "event_types": ALL[:1]}).json()
    assert (edited["name"], edited["event_types"], edited["url"]) == ("other", ALL[:1], made["url"])
    assert http_.post(f"{where}/disable").json()["disabled_reason"] == "Disabled by request."
    assert http_.delete(where).json()["deleted"] is True
    assert http_.get(where).status_code == 404
    assert http_.get(WEBHOOKS).json()["data"] == []


def test_a_project_has_twenty_webhooks_at_the_most(http_: httpx2.Client) -> None:
    for _ in range(20):
        created(http_)
    more = http_.post(WEBHOOKS, json={"name": "ci", "url": "https://example.com/", "event_types": ALL})

    assert (more.status_code, more.json()["error"]["code"]) == (429, "too_many_webhooks")


def test_a_stranger_finds_no_webhook_of_ours_and_is_told_of_no_job(
    secret_api: Api, stranger: str, http_: httpx2.Client
) -> None:
    made = created(http_)
    with secret_api.http(stranger) as theirs:
        listening = created(theirs)
        cancelled(secret_api, http_)
        assert listed(theirs, listening["id"]) == []
        where = f"{WEBHOOKS}/{made['id']}"
        (delivery,) = listed(http_, made["id"])
        for answer in (
            theirs.get(where),
            theirs.patch(where, json={"name": "x"}),
            theirs.delete(where),
            theirs.post(f"{where}/test", json={"event_type": ALL[0]}),
            theirs.post(f"{where}/rotate", json={}),
            theirs.post(f"{where}/disable"),
            theirs.get(f"{where}/deliveries"),
            theirs.post(f"{where}/deliveries/{delivery['id']}/replay"),
        ):
            assert answer.status_code == 404, answer.request.url
        assert theirs.post(f"{WEBHOOKS}/{listening['id']}/deliveries/{delivery['id']}/replay").status_code == 404
    http_.post(f"{where}/disable")


def test_ended_deliveries_are_forgotten_after_a_month(secret_api: Api, http_: httpx2.Client) -> None:
    made = created(http_)
    cancelled(secret_api, http_)
    http_.post(f"{WEBHOOKS}/{made['id']}/disable")
    with session_scope(secret_api.engine) as session:
        old = func.now() - deliveries.KEPT * 1.01
        session.execute(update(DeliveryRow).where(DeliveryRow.webhook_id == made["id"]).values(finished_at=old))
        deliveries.forget(session)

    assert listed(http_, made["id"]) == []


def test_tries_are_counted_by_what_came_of_them_also_when_the_deliveries_are_forgotten(
    secret_api: Api, http_: httpx2.Client
) -> None:
    made = created(http_)
    before = _tries(secret_api)
    for outcome in (SendResult(500, 0.1, "It answered 500."), SendResult(200, 0.1)):
        now(secret_api, made["id"])
        if outcome.error is not None:
            cancelled(secret_api, http_)
        due = claim(secret_api)
        assert due is not None
        assert finish(secret_api, due, outcome)
    cancelled(secret_api, http_)
    gone = claim(secret_api)
    assert gone is not None
    assert finish(secret_api, gone, SendResult(deliveries.GONE, 0.1, "It answered 410."))
    http_.delete(f"{WEBHOOKS}/{made['id']}")
    with session_scope(secret_api.engine) as session:
        session.execute(delete(DeliveryRow).where(DeliveryRow.webhook_id == made["id"]))

    after = _tries(secret_api)
    assert {name: after[name] - before[name] for name in after} == {"delivered": 1, "failed": 1, "given_up": 1}


def _tries(api: Api) -> dict[str, float]:
    with session_scope(api.engine) as session:
        counted = census.count(session)
    none = {"delivered": 0.0, "failed": 0.0, "given_up": 0.0}
    return none | {figure.first: figure.value for figure in counted if figure.name == "deliveries"}


def test_webhooks_are_run_from_the_command_line(secret_api: Api, http_: httpx2.Client) -> None:
    def tunepool(*words: str) -> str:
        options = ["--base-url", f"{secret_api.url}/v1", "--api-key", http_.key]  # type: ignore[attr-defined]
        done = CliRunner().invoke(cli, [*options, "webhooks", *words])
        assert done.exit_code == 0, done.output
        return done.stdout.strip()

    webhook_id, secret = tunepool("create", "http://127.0.0.1:9/hook", "--event", "failed").split()
    assert secret.startswith("whsec_")
    assert webhook_id in tunepool("list")
    assert tunepool("set", webhook_id, "rich=true").endswith("enabled http://127.0.0.1:9/hook")
    assert tunepool("rotate", webhook_id, "--keep").startswith("whsec_")
    delivery_id = tunepool("test", webhook_id)
    assert delivery_id in tunepool("deliveries", webhook_id)
    assert tunepool("replay", webhook_id, delivery_id).startswith("delivery_")
    assert "disabled" in tunepool("disable", webhook_id)
    assert "enabled" in tunepool("enable", webhook_id)
    assert tunepool("delete", webhook_id) == f"{webhook_id} deleted"
