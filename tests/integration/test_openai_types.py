"""OpenAI's objects, field by field as its own package types them (tests/openai_types.py)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import FileObject
from openai.types.chat import ChatCompletionChunk
from openai.types.fine_tuning import FineTuningJob
from pydantic import BaseModel, ValidationError

from api.app import create_app
from shared.store.db import session_scope
from shared.tenants import keys
from tests.factories import make_file
from tests.integration.conftest import Api
from tests.integration.test_openai_client import run_to_success, submit
from tests.integration.test_wire_details import settled
from tests.openai_types import FAULTS, TYPES, Listed, faults_of, faults_of_error, hold, type_of

FILE = {
    "id": "file-1",
    "object": "file",
    "bytes": 3,
    "created_at": 1,
    "filename": "a.jsonl",
    "purpose": "fine-tune",
    "status": "processed",
}


def test_every_route_of_openais_has_a_type_and_no_other_has_one(api: Api) -> None:
    routes = {
        f"{method.upper()} {path}"
        for path, methods in create_app(api.settings).openapi()["paths"].items()
        for method in methods
        if path.startswith("/v1/") and not path.startswith("/v1/tunepool/")
    }

    assert routes - TYPES.keys() == set()
    # The client's older way to cancel a run; the route is there, and stands in the document under its newer name.
    assert TYPES.keys() - routes <= {"POST /v1/evals/{eval_id}/runs/{run_id}"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bytes": None}, "bytes"),
        ({"bytes": "3"}, "bytes"),
        ({"created_at": 1.5}, "created_at"),
        ({"status": "done"}, "status"),
        ({"object": "files"}, "object"),
        ({"sha256": "a"}, "sha256 is no field"),
    ],
)
def test_a_wrong_field_or_one_too_many_is_noticed(change: dict[str, Any], said: str) -> None:
    assert list(faults_of(FileObject, json.dumps(FILE | {"tunepool": {"anything": 1}}))) == []
    assert said in next(faults_of(FileObject, json.dumps(FILE | change)))


@pytest.mark.parametrize("name", FILE)
def test_a_missing_field_is_noticed(name: str) -> None:
    without = {field: value for field, value in FILE.items() if field != name}

    assert name in next(faults_of(FileObject, json.dumps(without)))


def test_a_wrong_page_or_refusal_is_noticed() -> None:
    page = {"object": "list", "data": [FILE], "has_more": False, "first_id": "file-1", "last_id": "file-1"}
    files = Listed(FileObject, ids=True)

    assert list(faults_of(files, json.dumps(page))) == []
    assert list(faults_of(files, json.dumps(page | {"last_id": None})))
    assert list(faults_of(files, json.dumps(page | {"data": [FILE | {"bytes": "3"}]})))
    assert list(faults_of(files, json.dumps({key: value for key, value in page.items() if key != "has_more"})))
    assert list(faults_of_error('{"detail": "no"}'))
    assert list(faults_of_error('{"error": {"message": "no", "type": null, "param": null, "code": null}}'))


def test_answers_of_the_official_client_and_of_a_plain_one_are_looked_at(api: Api) -> None:
    hooks = [hold]

    assert api.client._client.event_hooks["response"] == hooks
    with api.http() as http:
        assert http.event_hooks["response"] == hooks
    assert type_of("GET", "/v1/models/ft:Qwen/Qwen2.5:org:s:1") is TYPES["GET /v1/models/{model}"]
    assert type_of("GET", "/v1/tunepool/pool") is None


def test_the_whole_way_of_files_uploads_jobs_models_permissions_and_graders_is_typed(api: Api) -> None:
    client, before = api.client, len(FAULTS)
    with session_scope(api.engine) as session:
        _, admin = keys.create(session, project_id=api.caller.project_id, name="admin", scopes=keys.EVERYTHING)
        other = make_file(session, api.caller, purpose="evals").id
    client.files.retrieve(other)
    upload = client.uploads.create(bytes=3, filename="a.txt", mime_type="text/plain", purpose="user_data")
    part = client.uploads.parts.create(upload.id, data=b"abc")
    client.uploads.complete(upload.id, part_ids=[part.id])
    client.uploads.cancel(client.uploads.create(bytes=3, filename="a", mime_type="text/plain", purpose="batch").id)
    for method in ("supervised", "dpo"):
        values = {"hyperparameters": {"n_epochs": 2}}
        waiting = submit(api, method={"type": method, method: values}, metadata={"a": "b"})
        client.fine_tuning.jobs.pause(waiting)
        client.fine_tuning.jobs.resume(waiting)
        client.fine_tuning.jobs.cancel(waiting)
    done = submit(api, integrations=[], suffix="typed")
    run_to_success(api, done)
    job = client.fine_tuning.jobs.retrieve(done)
    client.fine_tuning.jobs.list(limit=100)
    client.fine_tuning.jobs.list_events(done)
    client.fine_tuning.jobs.checkpoints.list(done)
    client.files.list(limit=100)
    client.models.list()
    assert job.fine_tuned_model is not None
    with api.http(admin) as http:
        shared = f"/v1/fine_tuning/checkpoints/{job.fine_tuned_model}/permissions"
        assert http.get(shared).status_code == 200
    grader: Any = {"type": "string_check", "name": "g", "input": "a", "reference": "a", "operation": "eq"}
    client.fine_tuning.alpha.graders.validate(grader=grader)
    client.fine_tuning.alpha.graders.run(grader=grader, model_sample="a")
    client.models.retrieve(job.fine_tuned_model)
    client.models.delete(job.fine_tuned_model)

    assert FAULTS[before:] == []


def test_a_status_and_methods_that_openais_types_do_not_name_are_the_only_differences_of_a_job(api: Api) -> None:
    with session_scope(api.engine) as session:
        file_id = make_file(session, api.caller).id
    with api.http() as http:
        body = {"model": "smollm2-135m-instruct", "training_file": file_id}
        job = http.post("/v1/fine_tuning/jobs", json={**body, "method": {"type": "kto"}}).json()
    api.client.fine_tuning.jobs.pause(job["id"])
    status = settled(api, job["id"])
    paused = api.client.fine_tuning.jobs.retrieve(job["id"])  # looked at as every answer

    assert (job["method"]["type"], status, paused.status) == ("kto", "paused", "paused")
    plainly = [error["loc"] for error in strictly(FineTuningJob, paused.model_dump(mode="json"))]
    assert {loc[0] for loc in plainly} == {"status", "method"}


def strictly(kind: type[BaseModel], document: dict[str, Any]) -> list[Any]:
    """The faults that pydantic finds, without knowing any difference."""
    try:
        kind.model_validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        return list(error.errors())
    return []


def test_chunks_have_a_type_too() -> None:
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}

    assert list(faults_of(ChatCompletionChunk, json.dumps(chunk))) == []
