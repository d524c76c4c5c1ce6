"""Who ends work of the CPU lane: its owner, and an administrator while it lasts; no other project ever."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import func, select

from shared.store.db import session_scope
from shared.store.tables import AuditRow, ExportRow, MergeRow
from shared.tenants import keys
from tests.factories import make_file, make_key, make_spec
from tests.integration.conftest import Api
from tests.integration.test_evals import ANSWERED, CHECK, CONFIG
from tests.integration.test_evaluations import PATH, post

PRODUCTS: dict[str, tuple[type[MergeRow] | type[ExportRow], str]] = {
    "merges": (MergeRow, "merge"),
    "exports": (ExportRow, "gguf"),
}


def product(api: Api, kind: str, *, status: str) -> str:
    row, named = PRODUCTS[kind]
    values: dict[str, Any] = {"project_id": api.caller.project_id, "status": status, "base_model": "b", "request": {}}
    if status == "succeeded":
        values |= {"finished_at": func.now(), "manifest": {"prefix": "p", "files": []}}
    row_id = f"{kind}-reached-{status}"
    with session_scope(api.engine) as session:
        session.add(row(id=row_id, kind=named, spec=make_spec().model_dump(), **values))
    return row_id


@pytest.fixture
def administrator(api: Api) -> str:
    """A key that runs the pool, of another organization's project."""
    with session_scope(api.engine) as session:
        return make_key(session, scopes=("*", "admin"))[1]


@pytest.mark.parametrize("kind", PRODUCTS)
def test_a_product_that_is_not_made_yet_is_ended_by_an_administrator_and_by_nobody_else(
    api: Api, stranger: str, administrator: str, kind: str
) -> None:
    waiting, made = product(api, kind, status="queued"), product(api, kind, status="succeeded")
    with api.http(stranger) as others, api.http(administrator) as operator:
        assert others.delete(f"/v1/tunepool/{kind}/{waiting}").status_code == 404
        assert operator.delete(f"/v1/tunepool/{kind}/{made}").status_code == 404
        assert operator.delete(f"/v1/tunepool/{kind}/{waiting}").status_code == 200
        assert operator.delete(f"/v1/tunepool/{kind}/{waiting}").status_code == 404

    with session_scope(api.engine) as session:
        row = PRODUCTS[kind][0]
        left = session.scalars(select(row.id).where(row.id.in_([waiting, made]), row.deleted_at.is_(None))).all()
        acts = session.scalars(select(AuditRow).where(AuditRow.target == waiting)).all()
        assert [(act.before or {}).get("project_id") for act in acts] == [api.caller.project_id]
    assert left == [made]


def test_an_evaluation_is_cancelled_by_an_administrator_and_by_no_other_project(
    api: Api, stranger: str, administrator: str
) -> None:
    first, second = (post(api).json()["id"] for _ in range(2))
    with api.http(stranger) as others, api.http(administrator) as operator, api.http() as own:
        assert others.post(f"{PATH}/{first}/cancel").status_code == 404
        assert operator.post(f"{PATH}/{first}/cancel").json()["status"] == "cancelled"
        assert own.get(f"{PATH}/{first}").json()["status"] == "cancelled"
        assert operator.post(f"{PATH}/{first}/cancel").status_code == 404
        assert operator.delete(f"{PATH}/{second}").status_code == 404, "its answers are its owner's"
        assert own.post(f"{PATH}/{second}/cancel").json()["status"] == "cancelled"


def test_a_run_of_an_eval_is_cancelled_by_an_administrator_and_by_no_other_project(
    api: Api, stranger: str, administrator: str
) -> None:
    with api.http(stranger) as others, api.http(administrator) as operator, api.http() as own:
        judged = own.post("/v1/evals", json={"data_source_config": CONFIG, "testing_criteria": [CHECK]}).json()["id"]
        runs = f"/v1/evals/{judged}/runs"
        run = own.post(runs, json={"data_source": ANSWERED}).json()["id"]
        assert others.post(f"{runs}/{run}/cancel").status_code == 404
        assert operator.post(f"{runs}/{run}/cancel").json()["status"] == "canceled"
        assert own.get(f"{runs}/{run}").json()["status"] == "canceled"
        assert operator.post(f"{runs}/{run}/cancel").status_code == 404, "what has ended is its owner's"


def test_the_check_of_a_file_is_ended_by_an_administrator_and_jobs_hear_why(
    api: Api, stranger: str, administrator: str
) -> None:
    with session_scope(api.engine) as session:
        file_id = make_file(session, api.caller, status="uploaded").id
    path = f"/v1/tunepool/chores/{file_id}/cancel"
    with api.http(stranger) as others, api.http(administrator) as operator, api.http() as own:
        assert others.post(path).status_code == 404
        unknown = operator.get("/v1/tunepool/chores", params={"kind": "filecheck"})
        assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "kind")
        seen = operator.get("/v1/tunepool/chores", params={"kind": "file_check", "after": file_id[:-1]}).json()["data"]
        assert [chore["project_id"] for chore in seen if chore["id"] == file_id] == [api.caller.project_id]
        assert operator.post(path).json()["kind"] == "file_check"
        refused = operator.post(path)
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, "chore_id")
        file = own.get(f"/v1/files/{file_id}").json()
    assert (file["status"], file["status_details"]) == (
        "error",
        "The check of this file was cancelled. Upload it again.",
    )


def test_work_is_ended_by_keys_that_may_make_it(api: Api) -> None:
    with session_scope(api.engine) as session:
        waiting = make_file(session, api.caller, status="uploaded").id
        scopes = ("jobs:read", "jobs:write")
        _, key = keys.create(session, project_id=api.caller.project_id, name="jobs", scopes=scopes)
    with api.http(key) as jobs:
        refused = jobs.post(f"/v1/tunepool/chores/{waiting}/cancel")
        assert (refused.status_code, "files:write" in refused.text) == (403, True)
    with api.http() as own:
        assert own.post(f"/v1/tunepool/chores/{waiting}/cancel").status_code == 200
