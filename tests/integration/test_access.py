"""Who may do what: every route against keys without its scope, without life, or of another project."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from datetime import timedelta

import httpx2
import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from api import errors
from api.app import create_app
from shared.errors import TunepoolError
from shared.jobs import moves
from shared.lease.journal import NewEvent
from shared.lease.values import Claim
from shared.store.db import session_scope
from shared.store.tables import ApiKeyRow, WorkerRow
from shared.tenants import keys
from tests.factories import claim_on, make_file, make_job, make_key, make_queued_job, make_worker
from tests.integration.conftest import Api
from tests.integration.test_bad_requests import refused
from tests.patience import patience

# Route -> the one scope that opens it. A route that is missing here fails the first test below.
SCOPE = {
    "POST /v1/files": "files:write",
    "GET /v1/files": "files:read",
    "GET /v1/files/{file_id}": "files:read",
    "GET /v1/files/{file_id}/content": "files:read",
    "DELETE /v1/files/{file_id}": "files:write",
    "POST /v1/uploads": "files:write",
    "POST /v1/uploads/{upload_id}/parts": "files:write",
    "POST /v1/uploads/{upload_id}/complete": "files:write",
    "POST /v1/uploads/{upload_id}/cancel": "files:write",
    "POST /v1/fine_tuning/jobs": "jobs:write",
    "GET /v1/fine_tuning/jobs": "jobs:read",
    "GET /v1/fine_tuning/jobs/{job_id}": "jobs:read",
    "POST /v1/fine_tuning/jobs/{job_id}/cancel": "jobs:write",
    "POST /v1/fine_tuning/jobs/{job_id}/pause": "jobs:write",
    "POST /v1/fine_tuning/jobs/{job_id}/resume": "jobs:write",
    "GET /v1/fine_tuning/jobs/{job_id}/events": "jobs:read",
    "GET /v1/fine_tuning/jobs/{job_id}/checkpoints": "jobs:read",
    "POST /v1/fine_tuning/checkpoints/{checkpoint}/permissions": "admin",
    "GET /v1/fine_tuning/checkpoints/{checkpoint}/permissions": "admin",
    "DELETE /v1/fine_tuning/checkpoints/{checkpoint}/permissions/{permission_id}": "admin",
    "GET /v1/tunepool/jobs/{job_id}/events/stream": "jobs:read",
    "POST /v1/fine_tuning/alpha/graders/validate": "jobs:write",
    "POST /v1/fine_tuning/alpha/graders/run": "jobs:write",
    "GET /v1/models": "models:read",
    "GET /v1/models/{model}": "models:read",
    "DELETE /v1/models/{model}": "models:write",
    "POST /v1/tunepool/models": "admin",
    "GET /v1/tunepool/models": "models:read",
    "GET /v1/tunepool/models/{name}": "models:read",
    "POST /v1/tunepool/models/{name}/check": "admin",
    "POST /v1/tunepool/models/{name}/prefetch": "admin",
    "GET /v1/tunepool/models/{name}/prefetch": "models:read",
    "DELETE /v1/tunepool/models/{name}": "admin",
    "GET /metrics": "metrics",
    "POST /v1/chat/completions": "models:read",
    "POST /v1/completions": "models:read",
    "GET /v1/tunepool/adapters": "models:read",
    "GET /v1/tunepool/adapters/{name}": "models:read",
    "GET /v1/tunepool/aliases": "models:read",
    "GET /v1/tunepool/aliases/{name}": "models:read",
    "GET /v1/tunepool/aliases/{name}/compare": "models:read",
    "POST /v1/tunepool/aliases/{name}/promote": "models:write",
    "POST /v1/tunepool/aliases/{name}/rollback": "models:write",
    "PATCH /v1/tunepool/aliases/{name}": "admin",
    "DELETE /v1/tunepool/aliases/{name}": "models:write",
    "GET /v1/tunepool/promotions": "models:read",
    "GET /v1/tunepool/promotions/{promotion_id}": "models:read",
    "POST /v1/tunepool/promotions/{promotion_id}/approve": "models:write",
    "POST /v1/tunepool/promotions/{promotion_id}/withdraw": "models:write",
    "POST /v1/tunepool/merges": "models:write",
    "POST /v1/tunepool/combinations": "models:write",
    "GET /v1/tunepool/merges": "models:read",
    "GET /v1/tunepool/merges/{merge_id}": "models:read",
    "DELETE /v1/tunepool/merges/{merge_id}": "models:write",
    "POST /v1/tunepool/sweeps": "jobs:write",
    "GET /v1/tunepool/sweeps": "jobs:read",
    "GET /v1/tunepool/sweeps/{sweep_id}": "jobs:read",
    "POST /v1/tunepool/sweeps/{sweep_id}/cancel": "jobs:write",
    "POST /v1/tunepool/sweeps/{sweep_id}/pause": "jobs:write",
    "POST /v1/tunepool/sweeps/{sweep_id}/resume": "jobs:write",
    "POST /v1/tunepool/exports": "models:write",
    "POST /v1/tunepool/pushes": "models:write",
    "GET /v1/tunepool/exports": "models:read",
    "GET /v1/tunepool/exports/{export_id}": "models:read",
    "DELETE /v1/tunepool/exports/{export_id}": "models:write",
    "POST /v1/tunepool/evaluations": "jobs:write",
    "GET /v1/tunepool/evaluations": "jobs:read",
    "GET /v1/tunepool/evaluations/{evaluation_id}": "jobs:read",
    "GET /v1/tunepool/evaluations/{evaluation_id}/items": "jobs:read",
    "POST /v1/tunepool/evaluations/{evaluation_id}/cancel": "jobs:write",
    "DELETE /v1/tunepool/evaluations/{evaluation_id}": "jobs:write",
    "POST /v1/evals": "jobs:write",
    "GET /v1/evals": "jobs:read",
    "GET /v1/evals/{eval_id}": "jobs:read",
    "POST /v1/evals/{eval_id}": "jobs:write",
    "DELETE /v1/evals/{eval_id}": "jobs:write",
    "POST /v1/evals/{eval_id}/runs": "jobs:write",
    "GET /v1/evals/{eval_id}/runs": "jobs:read",
    "GET /v1/evals/{eval_id}/runs/{run_id}": "jobs:read",
    "POST /v1/evals/{eval_id}/runs/{run_id}": "jobs:write",
    "POST /v1/evals/{eval_id}/runs/{run_id}/cancel": "jobs:write",
    "DELETE /v1/evals/{eval_id}/runs/{run_id}": "jobs:write",
    "GET /v1/evals/{eval_id}/runs/{run_id}/output_items": "jobs:read",
    "GET /v1/evals/{eval_id}/runs/{run_id}/output_items/{output_item_id}": "jobs:read",
    "GET /v1/tunepool/chores": "jobs:read",
    "POST /v1/tunepool/chores/{chore_id}/cancel": "jobs:write",
    "POST /v1/tunepool/preflights": "jobs:write",
    "GET /v1/tunepool/preflights": "jobs:read",
    "GET /v1/tunepool/preflights/{preflight_id}": "jobs:read",
    "DELETE /v1/tunepool/preflights/{preflight_id}": "jobs:write",
    "POST /v1/tunepool/webhooks": "jobs:write",
    "GET /v1/tunepool/webhooks": "jobs:read",
    "GET /v1/tunepool/webhooks/{webhook_id}": "jobs:read",
    "PATCH /v1/tunepool/webhooks/{webhook_id}": "jobs:write",
    "DELETE /v1/tunepool/webhooks/{webhook_id}": "jobs:write",
    "POST /v1/tunepool/webhooks/{webhook_id}/test": "jobs:write",
    "POST /v1/tunepool/webhooks/{webhook_id}/rotate": "jobs:write",
    "POST /v1/tunepool/webhooks/{webhook_id}/disable": "jobs:write",
    "POST /v1/tunepool/webhooks/{webhook_id}/enable": "jobs:write",
    "GET /v1/tunepool/webhooks/{webhook_id}/deliveries": "jobs:read",
    "POST /v1/tunepool/webhooks/{webhook_id}/deliveries/{delivery_id}/replay": "jobs:write",
    "POST /v1/tunepool/schedules": "jobs:write",
    "GET /v1/tunepool/schedules": "jobs:read",
    "GET /v1/tunepool/schedules/{schedule}": "jobs:read",
    "GET /v1/tunepool/schedules/{schedule}/runs": "jobs:read",
    "POST /v1/tunepool/schedules/{schedule}/run": "jobs:write",
    "POST /v1/tunepool/schedules/{schedule}/pause": "jobs:write",
    "POST /v1/tunepool/schedules/{schedule}/resume": "jobs:write",
    "DELETE /v1/tunepool/schedules/{schedule}": "jobs:write",
    "GET /v1/tunepool/secrets": "*",
    "PUT /v1/tunepool/secrets/{name}": "*",
    "DELETE /v1/tunepool/secrets/{name}": "*",
    "GET /v1/tunepool/pool": "jobs:read",
    "PATCH /v1/tunepool/pool": "admin",
    "POST /v1/tunepool/pool/hold": "admin",
    "POST /v1/tunepool/pool/release": "admin",
    "GET /v1/tunepool/workers": "admin",
    "POST /v1/tunepool/workers/{worker_id}/drain": "admin",
    "POST /v1/tunepool/workers/{worker_id}/undrain": "admin",
    "POST /v1/tunepool/devices/{device_id}/quarantine": "admin",
    "POST /v1/tunepool/devices/{device_id}/release": "admin",
    "GET /v1/tunepool/audit": "admin",
    "POST /v1/tunepool/jobs/{job_id}/hold": "jobs:write",
    "POST /v1/tunepool/jobs/{job_id}/release": "jobs:write",
    "POST /v1/tunepool/jobs/{job_id}/priority": "jobs:write",
    "GET /v1/tunepool/jobs/{job_id}/logs": "jobs:read",
    "POST /v1/tunepool/jobs/cancel": "jobs:write",
    "GET /v1/tunepool/projects": "admin",
    "POST /v1/tunepool/projects": "admin",
    "GET /v1/tunepool/projects/{project_id}": "admin",
    "PATCH /v1/tunepool/projects/{project_id}": "admin",
    "POST /v1/tunepool/projects/{project_id}/hold": "admin",
    "POST /v1/tunepool/projects/{project_id}/release": "admin",
    "GET /v1/tunepool/keys": "admin",
    "POST /v1/tunepool/keys": "admin",
    "PATCH /v1/tunepool/keys/{key_id}": "admin",
    "DELETE /v1/tunepool/keys/{key_id}": "admin",
    "POST /v1/tunepool/keys/{key_id}/rotate": "admin",
    "POST /v1/tunepool/oidc/rules": "admin",
    "GET /v1/tunepool/oidc/rules": "admin",
    "DELETE /v1/tunepool/oidc/rules/{rule_id}": "admin",
    "GET /v1/tunepool/usage": "jobs:read",
    "GET /v1/tunepool/lineage/{name}": "models:read",
}
OPEN = {
    "GET /livez",
    "GET /readyz",
    "GET /v1/tunepool/objects/{token}",
    "GET /v1/tunepool/signing-keys",
    "POST /v1/tunepool/oidc/token",
}


def ask(http: httpx2.Client, route: str) -> httpx2.Response:
    """The bare request: no body, so that whatever refuses it did not read one."""
    method, path = route.split()
    return http.request(method, re.sub(r"{\w+}", "x", path))


@pytest.fixture(scope="module")
def http(api: Api) -> Iterator[httpx2.Client]:
    with api.http() as client:
        yield client


def key_with(api: Api, *scopes: str) -> str:
    with session_scope(api.engine) as session:
        return make_key(session, scopes=scopes)[1]


def test_every_route_is_in_the_table(api: Api) -> None:
    schema = create_app(api.settings).openapi()
    routes = {f"{method.upper()} {path}" for path, methods in schema["paths"].items() for method in methods}

    assert routes == SCOPE.keys() | OPEN


@pytest.mark.parametrize("route", SCOPE)
def test_without_a_key_every_route_is_closed_before_it_reads_a_body(api: Api, route: str) -> None:
    with httpx2.Client(base_url=api.url, timeout=patience(20)) as http:
        answer = ask(http, route)

    assert refused(api, answer, status=401)["code"] == "missing_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("route", SCOPE)
def test_every_scope_but_the_right_one_is_a_403_and_the_right_one_opens(api: Api, route: str) -> None:
    # `*` stands for everything in one project: it opens no route that operates the pool.
    # `*` is for a key's own project, and an administrator also sees figures.
    enough = {"admin": set(), keys.METRICS: {"admin"}}.get(SCOPE[route], {"*"})
    others = keys.SCOPES - {SCOPE[route]} - enough

    with api.http(key_with(api, *others)) as wrong, api.http(key_with(api, SCOPE[route])) as right:
        error = refused(api, ask(wrong, route), status=403)
        assert ask(right, route).status_code not in (401, 403)

    assert error["type"] == "permission_error"
    assert SCOPE[route] in error["message"]


@pytest.mark.parametrize("end", [{"revoked_at": func.now()}, {"expires_at": func.now() - timedelta(seconds=1)}])
def test_a_key_that_has_ended_opens_nothing(api: Api, end: dict[str, object]) -> None:
    with session_scope(api.engine) as session:
        caller, secret = make_key(session)
    with api.http(secret) as http:
        assert http.get("/v1/models").status_code == 200
        with session_scope(api.engine) as session:
            session.execute(update(ApiKeyRow).where(ApiKeyRow.id == caller.key_id).values(**end))

        refused(api, http.get("/v1/models"), status=401)


@pytest.mark.parametrize("framing", ["Content-Length: 500000", "Transfer-Encoding: chunked"])
def test_a_long_body_is_not_read_for_a_key_that_has_ended(api: Api, framing: str) -> None:
    with session_scope(api.engine) as session:
        caller, secret = make_key(session)
        session.execute(update(ApiKeyRow).where(ApiKeyRow.id == caller.key_id).values(revoked_at=func.now()))
    address = httpx2.URL(api.url)
    head = ["POST /v1/fine_tuning/jobs HTTP/1.1", "Host: x", f"Authorization: Bearer {secret}", framing]

    with socket.create_connection((address.host, address.port or 80), timeout=patience(5)) as line:
        line.sendall("\r\n".join([*head, "Content-Type: application/json", "", ""]).encode())  # and never a body

        assert line.recv(100).startswith(b"HTTP/1.1 401 ")


def test_a_key_in_the_address_is_no_key(api: Api) -> None:
    with httpx2.Client(base_url=api.url, timeout=patience(20)) as http:
        refused(api, http.get("/v1/models", params={"api_key": api.key}), status=401)


def test_a_stranger_finds_no_job_of_ours_by_any_route(api: Api, stranger: str) -> None:
    with session_scope(api.engine) as session:
        job_id = make_job(session, api.caller).id
    path = f"/v1/fine_tuning/jobs/{job_id}"

    with api.http(stranger) as http:
        for route in ("GET", "POST /cancel", "POST /pause", "POST /resume", "GET /events", "GET /checkpoints"):
            method, _, rest = route.partition(" ")
            assert refused(api, http.request(method, path + rest), status=404)["param"] == "fine_tuning_job_id"
        assert http.get("/v1/fine_tuning/jobs").json()["data"] == []
        answer = http.get("/v1/fine_tuning/jobs", params={"after": job_id})
        assert refused(api, answer, status=404)["param"] == "after"
    with session_scope(api.engine) as session:
        assert moves.request_cancel(session, job_id, project_id=api.caller.project_id).status == "cancelled"


def test_a_stranger_finds_no_file_of_ours_by_any_route(api: Api, stranger: str, http: httpx2.Client) -> None:
    with session_scope(api.engine) as session:
        file_id = make_file(session, api.caller).id

    with api.http(stranger) as theirs:
        for method, rest in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            refused(api, theirs.request(method, f"/v1/files/{file_id}{rest}"), status=404)
        assert theirs.get("/v1/files").json()["data"] == []
    assert http.get(f"/v1/files/{file_id}").status_code == 200


def test_a_stranger_finds_no_adapter_and_no_checkpoint_of_ours(api: Api, stranger: str, http: httpx2.Client) -> None:
    name, checkpoint = trained(api)

    with api.http(stranger) as theirs:
        for one in (name, checkpoint):
            refused(api, theirs.get(f"/v1/models/{one}"), status=404)
            refused(api, theirs.get(f"/v1/tunepool/adapters/{one}"), status=404)
            refused(api, theirs.delete(f"/v1/models/{one}"), status=404)
        assert theirs.get("/v1/tunepool/adapters").json()["data"] == []
        assert name not in [model["id"] for model in theirs.get("/v1/models").json()["data"]]
    assert http.get(f"/v1/models/{name}").status_code == 200


def test_an_idempotency_key_means_nothing_under_another_api_key(api: Api, stranger: str, http: httpx2.Client) -> None:
    with session_scope(api.engine) as session:
        mine = make_file(session, api.caller).id
        theirs = make_file(session, keys.authenticate(session, stranger)).id
    header = {"Idempotency-Key": "shared-by-chance"}

    first = http.post("/v1/fine_tuning/jobs", json=job_of(mine), headers=header)
    with api.http(stranger) as other:
        second = other.post("/v1/fine_tuning/jobs", json=job_of(theirs), headers=header)
        other.post(f"/v1/fine_tuning/jobs/{second.json()['id']}/cancel")
    http.post(f"/v1/fine_tuning/jobs/{first.json()['id']}/cancel")

    assert (first.status_code, second.status_code) == (200, 200)
    assert "idempotent-replayed" not in second.headers


def test_the_pool_names_only_our_own_jobs(api: Api, stranger: str, http: httpx2.Client) -> None:
    with session_scope(api.engine) as session:
        claim = running(session, api)
    with api.http(stranger) as other:
        ours, theirs = (client.get("/v1/tunepool/pool").json() for client in (http, other))

    assert [device["job_id"] for device in ours["devices"] if device["leased"]] == [claim.lease.id]
    assert [device["job_id"] for device in theirs["devices"] if device["leased"]] == [None]
    assert ours["jobs"] == theirs["jobs"]
    assert ours["jobs"]["running"] == 1
    with session_scope(api.engine) as session:
        moves.succeed(session, claim.lease, manifest={"prefix": "p", "files": []})


def job_of(training_file: str) -> dict[str, str]:
    return {"model": "smollm2-135m-instruct", "training_file": training_file}


def running(session: Session, api: Api) -> Claim:
    """A job of ours that has just been leased to the one worker there is."""
    worker = session.scalars(select(WorkerRow)).first() or make_worker(session)
    job = make_queued_job(session, api.caller)
    claim = claim_on(session, worker)
    assert claim is not None
    assert claim.lease.id == job.id
    return claim


def trained(api: Api) -> tuple[str, str]:
    """Names of the adapter and the checkpoint of a job that has succeeded."""
    with session_scope(api.engine) as session:
        claim = running(session, api)
        moves.record(session, claim.lease, [NewEvent("Step 1/1")])
        checkpoint = f"{claim.model_name}:ckpt-step-1"
        moves.record_checkpoint(
            session, claim.lease, step=1, name=checkpoint, metrics={"step": 1}, manifest={"prefix": "c", "files": []}
        )
        assert moves.succeed(session, claim.lease, manifest={"prefix": "p", "files": []})
    return claim.model_name, checkpoint


@pytest.mark.parametrize("part", ["organization", "project"])
def test_a_request_that_names_another_organization_or_project_than_its_keys_is_refused(api: Api, part: str) -> None:
    own = {"organization": api.caller.organization_id, "project": api.caller.project_id}[part]
    header = f"OpenAI-{part.capitalize()}"

    with api.http() as client:
        assert client.get("/v1/models", headers={header: own}).status_code == 200
        assert client.get("/v1/models", headers={header: ""}).status_code == 200
        answer = client.get("/v1/models", headers={header: f"{own}x"})
    assert refused(api, answer, status=401)["code"] == f"mismatched_{part}"


@pytest.mark.parametrize("kind", [kind for kind, (status, _) in errors.STATUS.items() if status in {409, 503}])
def test_what_clients_retry_by_themselves_says_whether_that_helps(kind: type[TunepoolError]) -> None:
    answer = errors.answer(kind("It does not work."))

    assert answer.headers["x-should-retry"] == {409: "false", 503: "true"}[answer.status_code]
