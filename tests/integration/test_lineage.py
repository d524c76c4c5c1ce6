"""Lineage: data, jobs, adapters, merges and aliases in both directions; and what something needs is not deleted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session
from tunepool import lineage as cli_lineage

from shared.chores import exports, merges
from shared.contract.merge_request import CreateCombination, CreateExport, CreateMerge
from shared.ids import new_id
from shared.jobs import moves
from shared.store.db import session_scope
from shared.store.tables import AdapterRow, AuditRow, ExportRow, FileRow, JobRow, MergeRow
from tests.factories import make_file, make_job
from tests.integration.conftest import Api
from tests.integration.test_aliases import forced, refusal
from tests.integration.test_merges import make_adapter


@pytest.fixture(scope="module")
def http(api: Api) -> Iterator[httpx2.Client]:
    with api.http() as client:
        yield client


def tuned(api: Api) -> tuple[str, str, str]:
    """Names of a model, its job and the file it was trained on."""
    with session_scope(api.engine) as session:
        name = make_adapter(session, api.caller)
        job = job_of(session, name)
        job.status, job.manifest = "succeeded", {"prefix": "p", "files": []}
        return name, job.id, job.training_file


def job_of(session: Session, name: str) -> JobRow:
    return session.get_one(JobRow, session.scalars(select(AdapterRow.job_id).where(AdapterRow.name == name)).one())


def traced(http: httpx2.Client, name: str) -> tuple[dict[str, Any], set[tuple[str, str, str]]]:
    """(the answer, its arrows by the names of their ends)."""
    answer = http.get(f"/v1/tunepool/lineage/{name}").json()
    names = {node["id"]: node["name"] for node in answer["nodes"]}
    return answer, {(names[edge["source"]], edge["relation"], names[edge["target"]]) for edge in answer["edges"]}


def combined(api: Api, *names: str) -> str:
    """A combination that is made."""
    body = {"adapters": [{"adapter": name} for name in names], "combination_type": "cat"}
    with session_scope(api.engine) as session:
        request = CreateCombination.model_validate(body)
        row = merges.submit(session, request, project_id=api.caller.project_id)
        row.status, row.manifest, row.finished_at = "succeeded", {"prefix": "m", "files": []}, row.created_at
        return row.id


def test_an_alias_tells_the_data_behind_it_and_the_data_tells_the_alias(api: Api, http: httpx2.Client) -> None:
    (first, first_job, first_file), (second, second_job, _) = tuned(api), tuned(api)
    both = combined(api, first, second)
    forced(http, "lineage@prod", first)
    forced(http, "lineage@prod", both)
    with session_scope(api.engine) as session:
        file_name = session.get_one(FileRow, first_file).filename

    answer, arrows = traced(http, "lineage@prod")

    assert {
        (file_name, "training_file", first_job),
        (first_job, "made", first),
        (second_job, "made", second),
        (first, "combined", both),
        (second, "combined", both),
        (both, "named", "lineage@prod"),
        (first, "named", "lineage@prod"),
    } <= arrows
    current = {edge["source"]: edge["current"] for edge in answer["edges"] if edge["relation"] == "named"}
    assert [current[both], sorted(current.values())] == [True, [False, True]]

    _, forwards = traced(http, first_file)
    assert {(first_job, "made", first), (first, "combined", both), (both, "named", "lineage@prod")} <= forwards
    assert (second, "combined", both) not in forwards, "the other source is not made of this file"


def test_a_merge_a_checkpoint_and_a_continued_job_are_part_of_it_and_what_is_deleted_stays_in_it(
    api: Api, http: httpx2.Client
) -> None:
    name, job_id, file_id = tuned(api)
    with session_scope(api.engine) as session:
        merge = merges.submit(session, CreateMerge(adapter=name, onto="base"), project_id=api.caller.project_id).id
        further = make_job(session, api.caller)
        further.parent_id = session.scalars(select(AdapterRow.id).where(AdapterRow.name == name)).one()
        further_id = further.id

    _, arrows = traced(http, name)
    assert {(name, "merged", merge), (name, "continued", further_id), (job_id, "made", name)} <= arrows
    _, from_below = traced(http, merge)
    assert (job_id, "made", name) in from_below

    with session_scope(api.engine) as session:
        moves.request_cancel(session, further_id, project_id=api.caller.project_id)
        ended(session.get_one(MergeRow, merge))
    assert http.delete(f"/v1/models/{name}").status_code == 200
    assert http.delete(f"/v1/files/{file_id}").status_code == 200
    answer, _ = traced(http, merge)
    assert {node["name"] for node in answer["nodes"] if node["gone"]} >= {name}
    assert any(node["id"] == file_id and node["gone"] for node in answer["nodes"])


def ended(row: MergeRow | ExportRow) -> None:
    row.status, row.manifest, row.finished_at = "succeeded", {"prefix": "m", "files": []}, row.created_at


def exported(session: Session, api: Api, name: str) -> ExportRow:
    request = CreateExport(adapter=name, format="gguf", onto="base")
    return exports.submit(session, request, project_id=api.caller.project_id)


def pushed(session: Session, api: Api, of: ExportRow) -> str:
    """A push of an export that waits; as the route makes it, which asks for a hub and a token."""
    row = ExportRow(
        id=new_id("export_"),
        project_id=api.caller.project_id,
        kind="hub",
        status="queued",
        request={"model": of.id, "repository": "acme/tickets", "private": True},
        base_model=of.base_model,
        spec=of.spec,
    )
    session.add(row)
    session.flush()
    return row.id


def test_exports_and_what_was_pushed_of_them_are_part_of_it_in_both_directions(api: Api, http: httpx2.Client) -> None:
    name, job_id, _ = tuned(api)
    with session_scope(api.engine) as session:
        export = exported(session, api, name)
        ended(export)
        export_id, push_id = export.id, pushed(session, api, export)

    answer, arrows = traced(http, name)
    assert {(name, "exported", export_id), (export_id, "pushed", "acme/tickets")} <= arrows
    kinds = {node["id"]: node["kind"] for node in answer["nodes"]}
    assert (kinds[export_id], kinds[push_id]) == ("export", "push")
    lines = list(cli_lineage.lines(answer))
    assert any(f"export {export_id}, gguf q8_0  (exported)" in line for line in lines)
    _, from_the_end = traced(http, push_id)
    assert {(job_id, "made", name), (name, "exported", export_id)} <= from_the_end


def test_what_an_unfinished_export_or_push_is_made_of_is_not_deleted(api: Api, http: httpx2.Client) -> None:
    name, _, _ = tuned(api)
    with session_scope(api.engine) as session:
        export_id = exported(session, api, name).id

    answer = http.delete(f"/v1/models/{name}")
    assert refusal(answer, 409) == "model_in_use_by_product"
    assert export_id in answer.json()["error"]["message"]

    with session_scope(api.engine) as session:
        export = session.get_one(ExportRow, export_id)
        ended(export)
        push_id = pushed(session, api, export)
    assert http.delete(f"/v1/models/{name}").status_code == 200, "a finished export needs its model no more"
    answer = http.delete(f"/v1/tunepool/exports/{export_id}")
    assert refusal(answer, 409) == "model_in_use_by_product"
    assert http.delete(f"/v1/tunepool/exports/{push_id}").status_code == 200
    assert http.delete(f"/v1/tunepool/exports/{export_id}").status_code == 200


def test_what_nobody_has_and_what_another_project_has_is_a_404(api: Api, http: httpx2.Client, stranger: str) -> None:
    name, job_id, file_id = tuned(api)
    forced(http, "hidden@prod", name)

    assert http.get("/v1/tunepool/lineage/ft:nobody").status_code == 404
    with api.http(stranger) as theirs:
        for known in (name, job_id, file_id, "hidden@prod"):
            assert theirs.get(f"/v1/tunepool/lineage/{known}").status_code == 404


def test_a_model_that_a_job_goes_on_from_is_not_deleted_before_the_job_has_ended(api: Api, http: httpx2.Client) -> None:
    name, _, _ = tuned(api)
    with session_scope(api.engine) as session:
        waiting = make_job(session, api.caller)
        waiting.parent_id = session.scalars(select(AdapterRow.id).where(AdapterRow.name == name)).one()
        job_id = waiting.id

    answer = http.delete(f"/v1/models/{name}")
    assert refusal(answer, 409) == "model_in_use_by_job"
    assert job_id in answer.json()["error"]["message"]

    with session_scope(api.engine) as session:
        moves.request_cancel(session, job_id, project_id=api.caller.project_id)
    assert http.delete(f"/v1/models/{name}").status_code == 200


@pytest.mark.parametrize("through", ["adapter", "combination"])
def test_a_file_that_an_alias_stands_on_is_deleted_only_by_force_and_the_audit_says_so(
    api: Api, http: httpx2.Client, through: str
) -> None:
    name, _, file_id = tuned(api)
    alias = f"stands-{through}@prod"
    forced(http, alias, name if through == "adapter" else combined(api, name, tuned(api)[0]))
    forced(http, alias, tuned(api)[0])  # it is what a rollback would name

    answer = http.delete(f"/v1/files/{file_id}")
    assert refusal(answer, 409) == "file_in_use_by_alias"
    assert alias in answer.json()["error"]["message"]

    assert http.delete(f"/v1/files/{file_id}", params={"force": "true"}).status_code == 200
    with session_scope(api.engine) as session:
        entry = session.scalars(select(AuditRow).where(AuditRow.target == file_id)).one()
        assert entry.before["force"] is True  # type: ignore[index]


def test_a_file_is_free_again_once_no_alias_stands_on_it(api: Api, http: httpx2.Client) -> None:
    name, _, file_id = tuned(api)
    forced(http, "free@prod", name)
    for _ in range(2):
        forced(http, "free@prod", tuned(api)[0])

    assert http.delete(f"/v1/files/{file_id}").status_code == 200


def test_force_does_not_take_a_file_from_a_job_that_waits(api: Api, http: httpx2.Client) -> None:
    with session_scope(api.engine) as session:
        file_id = make_file(session, api.caller).id
        job = make_job(session, api.caller)
        job.training_file = file_id
        job_id = job.id

    assert http.delete(f"/v1/files/{file_id}", params={"force": "true"}).status_code == 409

    with session_scope(api.engine) as session:
        moves.request_cancel(session, job_id, project_id=api.caller.project_id)


def test_people_see_two_trees(api: Api, http: httpx2.Client) -> None:
    name, job_id, file_id = tuned(api)
    forced(http, "trees@prod", name)

    lines = list(cli_lineage.lines(http.get(f"/v1/tunepool/lineage/{name}").json()))

    assert lines[0].startswith(f"adapter {name}")
    made_of, made_into = lines.index("made of:"), lines.index("made into:")
    assert any(job_id in line for line in lines[made_of:made_into])
    assert any(file_id in line and line.startswith("    ") for line in lines[made_of:made_into])
    assert "trees@prod" in lines[made_into + 1]
