"""Small things that other clients, other languages and hasty scripts meet on OpenAI's wire."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from openai import NotFoundError

from shared.jobs import moves
from shared.store.db import session_scope
from shared.store.tables import EventRow, JobRow
from tests import moves as jobs_moves
from tests.factories import make_file, make_key, make_spec
from tests.integration.conftest import Api
from tests.lifecycle.stack import until
from tests.patience import patience
from worker.chores.checks import oddities

JOBS = "/v1/fine_tuning/jobs"
GIB = 1024**3


def made(api: Api, **fields: Any) -> httpx2.Response:
    with session_scope(api.engine) as session:
        file_id = make_file(session, api.caller).id
    with api.http() as http:
        return http.post(JOBS, json={"model": "smollm2-135m-instruct", "training_file": file_id, **fields})


def test_azures_header_brings_a_key_and_openais_wins_over_it(api: Api) -> None:
    with httpx2.Client(base_url=api.url, timeout=patience(20)) as http:
        alone = http.get("/v1/models", headers={"api-key": api.key})
        wrong = http.get("/v1/models", headers={"api-key": "tp_nothing"})
        both = http.get("/v1/models", headers={"api-key": api.key, "Authorization": "Bearer tp_nothing"})

    assert (alone.status_code, wrong.status_code, both.status_code) == (200, 401, 401)


def test_a_number_that_is_whole_is_an_integer_however_it_is_written(api: Api) -> None:
    hyperparameters = '{"n_epochs": 3.0, "batch_size": 2e0, "learning_rate_multiplier": 2.0}'
    with session_scope(api.engine) as session:
        file_id = make_file(session, api.caller).id
    body = f'{{"model": "smollm2-135m-instruct", "training_file": "{file_id}", "seed": 7.0, "hyperparameters": '
    with api.http(**{"Content-Type": "application/json"}) as http:
        taken = http.post(JOBS, content=body + hyperparameters + "}")
        refused = http.post(JOBS, content=body + hyperparameters.replace("3.0", "3.5") + "}")

    assert taken.status_code == 200, taken.text
    assert taken.json()["seed"] == 7
    assert taken.json()["hyperparameters"] == {"n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 2.0}
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "hyperparameters.n_epochs")


@pytest.mark.parametrize(("asked", "told"), [({"beta": 0.2}, 0.2), ({"beta": "auto"}, "auto"), ({}, "auto")])
def test_beta_is_told_before_the_files_are_checked(api: Api, asked: dict[str, Any], told: Any) -> None:
    answer = made(api, method={"type": "dpo", "dpo": {"hyperparameters": asked}})

    assert answer.status_code == 200, answer.text
    assert answer.json()["method"]["dpo"]["hyperparameters"]["beta"] == told
    supervised = made(api).json()["method"]["supervised"]["hyperparameters"]
    assert supervised.keys() == {"batch_size", "learning_rate_multiplier", "n_epochs"}


def test_a_file_without_an_end_has_no_field_that_says_so(api: Api) -> None:
    with session_scope(api.engine) as session:
        file_id = make_file(session, api.caller).id
    with api.http() as http:
        told = http.get(f"/v1/files/{file_id}").json()

    assert not {"expires_at", "status_details"} & told.keys()
    assert api.client.files.retrieve(file_id).expires_at is None


def test_one_sentence_for_a_job_that_is_not_there(api: Api) -> None:
    jobs, said = api.client.fine_tuning.jobs, []
    for ask in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events):
        with pytest.raises(NotFoundError) as caught:
            ask("ftjob-00000000000000000000000000000000")
        said.append((caught.value.message, caught.value.param))

    assert len(set(said)) == 1


def test_a_full_queue_is_not_asked_again_by_the_client(api: Api) -> None:
    with session_scope(api.engine) as session:
        caller, secret = make_key(session, max_queued=1)
        body = {"model": "smollm2-135m-instruct", "training_file": make_file(session, caller).id}
    with api.http(secret) as http:
        assert http.post(JOBS, json=body).status_code == 200
        full = http.post(JOBS, json={**body, "suffix": "another"})

    assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
    assert full.headers["x-should-retry"] == "false"


def test_a_job_that_is_paused_at_once_is_held_when_its_files_are_checked(api: Api) -> None:
    job_id = made(api).json()["id"]
    asked = api.client.fine_tuning.jobs.pause(job_id)
    again = api.client.fine_tuning.jobs.pause(job_id)

    assert (asked.status, again.status) == ("validating_files", "validating_files")
    assert asked.model_extra is not None
    assert asked.model_extra["tunepool"]["pause_requested_at"]
    assert settled(api, job_id) == "paused"
    paused = api.client.fine_tuning.jobs.retrieve(job_id)
    assert paused.model_extra is not None
    assert paused.model_extra["tunepool"]["pause_requested_at"] is None
    assert "Job paused" in [event.message for event in api.client.fine_tuning.jobs.list_events(job_id)]
    assert api.client.fine_tuning.jobs.resume(job_id).status == "queued"


def test_a_wish_to_pause_is_taken_back_by_resume(api: Api) -> None:
    job_id = made(api).json()["id"]
    api.client.fine_tuning.jobs.pause(job_id)

    assert api.client.fine_tuning.jobs.resume(job_id).status == "validating_files"
    assert settled(api, job_id) == "queued"


@pytest.mark.parametrize("same", [True, False])
def test_a_job_that_is_validated_with_its_training_rows_is_warned(api: Api, same: bool) -> None:
    with session_scope(api.engine) as session:
        training = make_file(session, api.caller, sha256="1" * 64).id
        validation = make_file(session, api.caller, sha256=("1" if same else "2") * 64).id
    body = {"model": "smollm2-135m-instruct", "training_file": training, "validation_file": validation}
    with api.http() as http:
        job_id = http.post(JOBS, json=body).json()["id"]
    with session_scope(api.engine) as session:
        while (claim := moves.claim_validation(session, worker_id="checker", lease_seconds=60)) is not None:
            if claim.lease.id == job_id:
                warned = [event.level for event in oddities(claim) if "same bytes" in event.message]
                assert warned == (["warn"] if same else [])
                break
        assert claim is not None


def test_a_list_says_of_each_waiting_job_where_it_stands(api: Api) -> None:
    queued, checked = made(api).json()["id"], made(api).json()["id"]
    assert settled(api, queued) == "queued"
    api.client.fine_tuning.jobs.cancel(checked)

    def places() -> dict[str, Any]:
        listed = api.client.fine_tuning.jobs.list(limit=10)
        return {job.id: (job.model_extra or {})["tunepool"]["queue"] for job in listed.data}

    until(lambda: places()[queued]["position"], what="the next plan knows the job")
    alone = api.client.fine_tuning.jobs.retrieve(queued)

    assert alone.model_extra is not None
    assert places()[queued]["position"] == alone.model_extra["tunepool"]["queue"]["position"] >= 1
    assert places()[queued]["detail"]
    assert places()[checked] is None


def test_an_empty_after_is_the_first_page_of_every_list(api: Api) -> None:
    job_id = made(api).json()["id"]
    lists = ("/v1/files", JOBS, f"{JOBS}/{job_id}/events", f"{JOBS}/{job_id}/checkpoints", "/v1/evals")
    with api.http() as http:
        for path in (*lists, "/v1/tunepool/merges", "/v1/tunepool/aliases", "/v1/tunepool/preflights"):
            first, empty = http.get(path), http.get(path, params={"after": ""})
            assert (path, empty.status_code) == (path, 200), empty.text
            assert [one.get("id") for one in empty.json()["data"]] == [one.get("id") for one in first.json()["data"]]


@pytest.mark.parametrize("name", ["include[]", "include"])
def test_a_list_has_settings_and_reasons_of_its_jobs_where_they_are_asked_for(api: Api, name: str) -> None:
    job_id = made(api).json()["id"]
    assert settled(api, job_id) == "queued"
    with session_scope(api.engine) as session:
        session.get_one(JobRow, job_id).auto = [{"field": "training.batch_size", "value": 1, "reason": "few rows"}]

    def listed(*parts: str) -> dict[str, Any]:
        with api.http() as http:
            page = http.get(JOBS, params=[("limit", "100"), *((name, part) for part in parts)])
        assert page.status_code == 200, page.text
        return next(job for job in page.json()["data"] if job["id"] == job_id)

    alone = api.client.fine_tuning.jobs.retrieve(job_id)
    assert alone.model_extra is not None
    whole = alone.model_extra["tunepool"]
    bare, one, both = listed(), listed("tunepool.spec"), listed("tunepool.spec", "tunepool.auto")

    assert whole["spec"]
    assert [(job["tunepool"]["spec"], job["tunepool"]["auto"]) for job in (bare, one, both)] == [
        (None, []),
        (whole["spec"], []),
        (whole["spec"], whole["auto"]),
    ]
    assert bare["hyperparameters"] == alone.hyperparameters.to_dict(), "what OpenAI's fields say does not depend on it"


def test_what_a_list_cannot_include_is_named(api: Api) -> None:
    with api.http() as http:
        answer = http.get(JOBS, params={"include[]": "tunepool.attempts"})

    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("include[]")
    assert "tunepool.spec" in answer.json()["error"]["message"]


def settled(api: Api, job_id: str) -> str:
    """The status of a job whose files were found good just now."""
    with session_scope(api.engine) as session:
        while (claim := moves.claim_validation(session, worker_id="checker", lease_seconds=60)) is not None:
            assert moves.validated(session, claim.lease, spec=make_spec(), auto=[], bytes_per_device=GIB)
        assert session.query(EventRow).filter_by(job_id=job_id).count() > 0
        session.flush()
        assert jobs_moves.of(session, job_id) <= jobs_moves.listed()
        return str(session.get_one(JobRow, job_id).status)
