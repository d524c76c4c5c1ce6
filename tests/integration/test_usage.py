"""Accounting from leases: exact, clipped to the span, and nobody else's."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import httpx2
import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from shared.errors import Invalid
from shared.jobs import moves
from shared.store.db import session_scope
from shared.store.tables import AttemptRow, WorkerRow
from shared.tenants import usage
from shared.tenants.keys import Caller
from tests.factories import claim_on, make_caller, make_key, make_queued_job, make_worker
from tests.integration.conftest import Api
from tests.integration.test_bad_requests import refused

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


def lease(session: Session, caller: Caller, *, start: datetime, end: datetime, **job: object) -> str:
    """A job that held one device from `start` to `end`."""
    row = make_queued_job(session, caller, **job)
    worker = session.scalars(select(WorkerRow)).first() or make_worker(session)
    claim = claim_on(session, worker)
    assert claim is not None
    assert moves.succeed(session, claim.lease, manifest={"prefix": "p", "files": []})
    session.execute(update(AttemptRow).where(AttemptRow.job_id == row.id).values(started_at=start, ended_at=end))
    return row.id


def test_a_lease_counts_with_its_part_inside_the_span(session: Session) -> None:
    caller = make_caller(session)
    lease(session, caller, start=NOON - HOUR, end=NOON + HOUR)
    lease(session, caller, start=NOON + HOUR / 2, end=NOON + 3 * HOUR)
    lease(session, caller, start=NOON + 5 * HOUR, end=NOON + 6 * HOUR)

    (found,) = usage.report(
        session, since=NOON, until=NOON + 2 * HOUR, group_by=["project"], project_id=caller.project_id
    )

    assert found.device_seconds == 3600 + 1.5 * 3600
    assert (found.project, found.attempts, found.jobs) == (caller.project_id, 2, 2)


def test_a_lease_on_two_devices_counts_twice(session: Session) -> None:
    caller = make_caller(session)
    job_id = lease(session, caller, start=NOON, end=NOON + HOUR)
    session.execute(update(AttemptRow).where(AttemptRow.job_id == job_id).values(device_ids=["a", "b"]))

    (found,) = usage.report(session, since=NOON, until=NOON + HOUR, group_by=[], project_id=caller.project_id)

    assert found.device_seconds == 7200


def test_groups_are_project_key_model_and_any_label(session: Session) -> None:
    caller = make_caller(session)
    lease(session, caller, start=NOON, end=NOON + HOUR, metadata={"team": "search"})
    lease(session, caller, start=NOON, end=NOON + 2 * HOUR, metadata={"team": "ads"})
    lease(session, caller, start=NOON, end=NOON + HOUR / 2)

    found = usage.report(
        session,
        since=NOON,
        until=NOON + 3 * HOUR,
        group_by=["key", "model", "label:team"],
        project_id=caller.project_id,
    )

    assert [(one.labels, one.device_seconds) for one in found] == [
        ({"team": "ads"}, 7200),
        ({"team": "search"}, 3600),
        ({"team": None}, 1800),
    ]
    assert {(one.key, one.model) for one in found} == {(caller.key_id, "smollm2-135m-instruct")}


def test_an_unknown_group_and_an_empty_span_are_named(session: Session) -> None:
    with pytest.raises(Invalid, match="'colour'"):
        usage.report(session, since=NOON, until=NOON + HOUR, group_by=["colour"], project_id=None)
    with pytest.raises(Invalid, match="before"):
        usage.report(session, since=NOON, until=NOON, group_by=[], project_id=None)


@pytest.mark.parametrize("label", ["=HYPERLINK(1)", " =1+1", "\u00a0@SUM(A1)", "\uff1d1+1", "-1", "+1"], ids=ascii)
def test_a_label_is_no_formula_in_the_table(session: Session, label: str) -> None:
    caller = make_caller(session)
    lease(session, caller, start=NOON, end=NOON + HOUR, metadata={"team": label})
    found = usage.report(session, since=NOON, until=NOON + HOUR, group_by=["label:team"], project_id=caller.project_id)

    assert usage.as_csv(found, ["label:team"]).splitlines() == [
        "label:team,device_seconds,attempts,jobs",
        f"'{label},3600.0,1,1",
    ]


def test_what_a_running_lease_is_charged_for_is_told_apart_from_what_it_has_used(session: Session) -> None:
    caller = make_caller(session)
    job, worker = make_queued_job(session, caller), make_worker(session)
    claim = claim_on(session, worker)
    assert claim is not None
    session.refresh(job)
    charged = job.charged_seconds

    assert charged > 60
    assert usage.this_month(session, [job.project_id])[job.project_id] == pytest.approx(charged)
    assert usage.reserved(session, [job.project_id])[job.project_id] == pytest.approx(charged, abs=60)
    assert moves.succeed(session, claim.lease, manifest={"prefix": "p", "files": []})
    assert usage.reserved(session, [job.project_id]) == {}


@pytest.fixture(scope="module")
def ledger(api: Api) -> str:
    """A lease of ours and one of another project; returns the other project's id."""
    with session_scope(api.engine) as session:
        lease(session, api.caller, start=NOON, end=NOON + HOUR)
        other = make_caller(session)
        lease(session, other, start=NOON, end=NOON + 2 * HOUR)
    return other.project_id


def test_a_project_sees_its_own_and_an_administrator_everybodys(api: Api, ledger: str) -> None:
    span = {"from": int(NOON.timestamp()), "to": int((NOON + 4 * HOUR).timestamp())}
    with session_scope(api.engine) as session:
        admin = make_key(session, scopes=("jobs:read", "admin"))[1]

    with api.http() as own, api.http(admin) as all_of_them:
        ours = own.get("/v1/tunepool/usage", params=span).json()
        everybodys = all_of_them.get("/v1/tunepool/usage", params=span).json()
        one = all_of_them.get("/v1/tunepool/usage", params={**span, "project_id": ledger}).json()
        refused(api, own.get("/v1/tunepool/usage", params={**span, "project_id": ledger}), status=403)
        table = own.get("/v1/tunepool/usage", params={**span, "group_by": "project,model", "format": "csv"})

    assert (ours["from"], ours["device_seconds"]) == (span["from"], 3600)
    assert [row["project"] for row in ours["data"]] == [api.caller.project_id]
    assert everybodys["device_seconds"] == 3 * 3600
    assert [row["project"] for row in one["data"]] == [ledger]
    assert table.headers["content-type"].startswith("text/csv")
    assert table.text.splitlines()[1] == f"{api.caller.project_id},smollm2-135m-instruct,3600.0,1,1"


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("from=x", "from"),
        ("from=-1", "from"),
        ("group_by=colour", "group_by"),
        ("format=xml", "format"),
        ("to=0", "from"),
    ],
)
def test_a_bad_query_names_its_parameter(api: Api, query: str, param: str) -> None:
    with api.http() as http:
        assert refused(api, http.get(f"/v1/tunepool/usage?{query}"))["param"] == param


def test_usage_of_nothing_is_an_empty_list(api: Api, stranger: str) -> None:
    with api.http(stranger) as http:
        found: httpx2.Response = http.get("/v1/tunepool/usage")

    assert found.json()["data"] == []
    assert found.json()["device_seconds"] == 0
