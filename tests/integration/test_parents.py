"""`model` of a job may be a tuned model, a checkpoint or an alias; what is waited for is not withdrawn."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from openai import OpenAI
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from shared.ids import new_id
from shared.jobs import moves, parents
from shared.jobs.moves import claim_validation
from shared.store.db import session_scope
from shared.store.tables import AdapterRow, EventRow, JobRow, PermissionRow, ProjectRow
from shared.tenants import keys
from tests.factories import make_file, make_job, make_spec
from tests.integration.conftest import Api
from tests.integration.test_access import trained
from tests.openai_types import held
from tests.patience import patience

BASE = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Place:
    """A tuned model of ours, a checkpoint of it, and a project of the same organization."""

    model: str
    checkpoint: str
    friend_id: str
    friend: OpenAI


@pytest.fixture
def place(api: Api) -> Iterator[Place]:
    with session_scope(api.engine) as session:  # what an earlier test left would be settled first
        session.execute(update(JobRow).where(JobRow.status == "validating_files").values(status="cancelled"))
    model, checkpoint = trained(api)
    with session_scope(api.engine) as session:
        friend = ProjectRow(id=new_id("proj_"), organization_id=api.caller.organization_id, name=new_id("p"))
        session.add(friend)
        session.flush()
        friend_id = friend.id
        _, secret = keys.create(session, project_id=friend_id, name="theirs", scopes=("*",))
    with OpenAI(base_url=f"{api.url}/v1", api_key=secret, max_retries=0, http_client=held()) as client:
        yield Place(model, checkpoint, friend_id, client)


def file_of(api: Api, project_id: str | None = None) -> str:
    with session_scope(api.engine) as session:
        row = make_file(session, api.caller)
        row.project_id = project_id or row.project_id
        return row.id


def submit(api: Api, model: str, **fields: Any) -> Any:
    return api.client.fine_tuning.jobs.create(model=model, training_file=file_of(api), **fields)


def row_of(api: Api, job_id: str) -> JobRow:
    with Session(api.engine) as session:
        return session.get_one(JobRow, job_id)


def refusal(error: Any, status: int) -> str:
    assert error.value.status_code == status, error.value
    return str(error.value.code)


def test_a_job_names_a_tuned_model_and_says_which_one_it_goes_on_from(api: Api, place: Place) -> None:
    job = submit(api, place.model, suffix="next")

    assert job.model == place.model
    assert job.tunepool["parent"]["model"] == place.model
    assert job.tunepool["parent"]["init_from"] is None  # nobody has settled it
    row = row_of(api, job.id)
    assert row.base_model == BASE
    with Session(api.engine) as session:
        said = session.scalars(select(EventRow.message).where(EventRow.job_id == job.id)).all()
    assert f"It goes on from {place.model}" in said
    api.client.fine_tuning.jobs.cancel(job.id)


def test_the_one_that_settles_a_job_hears_of_its_parent_until_that_is_withdrawn(api: Api, place: Place) -> None:
    job = submit(api, place.checkpoint)
    with session_scope(api.engine) as session:
        claim = claim_validation(session, worker_id="checker", lease_seconds=60)
        assert claim is not None
        assert claim.lease.id == job.id
        assert claim.parent is not None
        assert (claim.parent.name, claim.parent.spec) == (place.checkpoint, make_spec())
        moves.fail(session, claim.lease, code="x", message="x")


def test_an_alias_stands_for_the_model_that_it_names_at_that_moment(api: Api, place: Place) -> None:
    alias = f"{new_id('bot')[:20]}@prod"
    forced = {"model": place.model, "force": True, "reason": "a test"}
    with api.http() as client:
        promoted = client.post(f"/v1/tunepool/aliases/{alias}/promote", json=forced)
        assert promoted.status_code == 200, promoted.text
    job = submit(api, alias)

    assert (job.model, job.tunepool["parent"]["model"]) == (alias, place.model)
    api.client.fine_tuning.jobs.cancel(job.id)


def test_a_model_of_another_project_needs_its_permission(api: Api, place: Place) -> None:
    theirs = file_of(api, place.friend_id)
    with pytest.raises(openai.NotFoundError) as unknown:
        place.friend.fine_tuning.jobs.create(model=place.model, training_file=theirs)
    assert refusal(unknown, 404) == "model_not_found"

    with session_scope(api.engine) as session:
        owner = api.caller.project_id
        given = {"id": new_id("cp_"), "checkpoint": place.model, "owner_id": owner, "project_id": place.friend_id}
        session.add(PermissionRow(**given))
    job = place.friend.fine_tuning.jobs.create(model=place.model, training_file=theirs)
    assert job.model == place.model
    with session_scope(api.engine) as session:
        assert parents.of_job(session, session.get_one(JobRow, job.id)) is not None
        session.delete(session.get_one(PermissionRow, given["id"]))
        session.flush()
        assert parents.of_job(session, session.get_one(JobRow, job.id)) is None


def test_a_model_that_an_unfinished_job_goes_on_from_is_not_deleted(api: Api, place: Place) -> None:
    job = submit(api, place.model)
    with pytest.raises(openai.ConflictError) as refused:
        api.client.models.delete(place.model)
    assert refusal(refused, 409) == "model_in_use_by_job"
    assert job.id in refused.value.message

    api.client.fine_tuning.jobs.cancel(job.id)
    assert api.client.models.delete(place.model).deleted
    with pytest.raises(openai.NotFoundError):
        submit(api, place.model)


def test_a_job_of_another_project_keeps_no_model_from_its_owner_and_is_told(api: Api, place: Place) -> None:
    with session_scope(api.engine) as session:
        given = {"id": new_id("cp_"), "checkpoint": place.model, "owner_id": api.caller.project_id}
        session.add(PermissionRow(**given, project_id=place.friend_id))
    job = place.friend.fine_tuning.jobs.create(model=place.model, training_file=file_of(api, place.friend_id))

    assert api.client.models.delete(place.model).deleted
    newest = place.friend.fine_tuning.jobs.list_events(job.id).data[0]
    assert (newest.level, newest.data["code"]) == ("warn", "parent_gone")


def test_a_delete_waits_for_the_submission_that_names_the_model(api: Api, place: Place) -> None:
    """Whichever comes first, no job is left with a model that went away behind its back."""
    with session_scope(api.engine) as session:
        parent = parents.find(session, place.model, project_id=api.caller.project_id)
        parents.hold(session, parent)
        refusals: list[openai.ConflictError] = []

        def delete() -> None:
            try:
                api.client.models.delete(place.model)
            except openai.ConflictError as error:
                refusals.append(error)

        deleting = threading.Thread(target=delete)
        deleting.start()
        job = make_job(session, api.caller)
        job_id = job.id
        session.execute(update(JobRow).where(JobRow.id == job_id).values(parent_id=parent.id, parent_name=parent.name))
    deleting.join(patience(20))

    assert [error.code for error in refusals] == ["model_in_use_by_job"]
    api.client.fine_tuning.jobs.cancel(job_id)


def test_what_contradicts_the_tuned_model_is_refused_at_submit_and_at_the_preflight(api: Api, place: Place) -> None:
    wider = {"tunepool": {"adapter": {"r": 99}}}
    with pytest.raises(openai.BadRequestError) as refused:
        submit(api, place.model, extra_body=wider)
    assert refused.value.param == "tunepool.adapter.r"
    with api.http() as client:
        body = {"model": place.model, "training_file": file_of(api)}
        assert (
            client.post("/v1/tunepool/preflights", json={**body, **wider}).json()["error"]["param"]
            == refused.value.param
        )
        assert client.post("/v1/tunepool/preflights", json=body).status_code == 200
    with pytest.raises(openai.BadRequestError) as base_model:
        submit(api, BASE, extra_body={"tunepool": {"adapter": {"init_from": "continue"}}})
    assert base_model.value.param == "tunepool.adapter.init_from"


@pytest.mark.parametrize("part", ["name", "revision"])
def test_a_tuned_model_whose_base_is_gone_or_another_now_is_refused_by_name(api: Api, place: Place, part: str) -> None:
    with session_scope(api.engine) as session:
        adapter = session.scalars(select(AdapterRow).where(AdapterRow.name == place.model)).one()
        job = session.get_one(JobRow, adapter.job_id)
        job.spec = {**job.spec, "base_model": {**job.spec["base_model"], part: "elsewhere"}}
    with pytest.raises(openai.ConflictError) as refused:
        submit(api, place.model)

    assert refusal(refused, 409) == {"name": "base_model_gone", "revision": "base_model_changed"}[part]
    assert refused.value.response.headers["x-should-retry"] == "false"


def test_an_unknown_tuned_model_is_not_taken_for_a_base_model(api: Api, place: Place) -> None:
    for name in (f"{place.model}x", f"{place.checkpoint}9", "nobody@prod", "merge_0", "adapter_0"):
        with pytest.raises(openai.NotFoundError) as unknown:
            submit(api, name)
        assert refusal(unknown, 404) == "model_not_found"
