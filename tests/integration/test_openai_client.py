"""The unmodified openai client against a live API."""

from __future__ import annotations

import hashlib
import json

import httpx2
import openai
import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from shared.contract.events import EXIT_STOPPED
from shared.jobs import moves
from shared.lease.journal import NewEvent
from shared.lease.values import Claim
from shared.store.db import session_scope
from shared.store.storage import open_store
from shared.store.tables import AdapterRow, CheckpointRow, FileRow, JobRow, WorkerRow
from tests.factories import GIB, claim_on, make_spec, make_worker
from tests.integration.conftest import Api

ROW = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]})
TRAINING = ("train.jsonl", (ROW + "\n").encode() * 20)


def upload(api: Api) -> str:
    return api.openai().files.create(file=TRAINING, purpose="fine-tune").id


def submit(api: Api, **values: object) -> str:
    arguments = {"model": "smollm2-135m-instruct", "training_file": upload(api), **values}
    return api.openai().fine_tuning.jobs.create(**arguments).id  # type: ignore[arg-type]


def start(api: Api, job_id: str) -> Claim:
    """What a worker would do up to the start of the trainer, by the same verbs."""
    with session_scope(api.engine) as session:
        file = session.get_one(JobRow, job_id).training_file
        session.execute(update(FileRow).where(FileRow.id == file).values(status="processed"))
    with session_scope(api.engine) as session:
        claim = validation_claim(session, job_id)
        assert moves.validated(session, claim.lease, spec=make_spec(), auto=[], bytes_per_device=GIB)
    with session_scope(api.engine) as session:
        worker = session.scalars(select(WorkerRow)).first() or make_worker(session)
        training = claim_on(session, worker)
        assert training is not None
        assert training.lease.id == job_id
        return training


def run_to_success(api: Api, job_id: str) -> None:
    training = start(api, job_id)
    with session_scope(api.engine) as session:
        moves.record(
            session, training.lease, [NewEvent("Step 1/1", type="metrics", data={"step": 1, "train_loss": 0.5})]
        )
        name = f"{training.model_name}:ckpt-step-1"
        moves.record_checkpoint(
            session, training.lease, step=1, name=name, metrics={"step": 1, "train_loss": 0.5}, manifest={}
        )
        content = b"weights"
        entry = {
            "name": "adapter_model.safetensors",
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        moves.succeed(session, training.lease, manifest={"prefix": "made/adapter", "files": [entry]}, trained_tokens=40)


def validation_claim(session: Session, job_id: str):
    while (claim := moves.claim_validation(session, worker_id="checker", lease_seconds=60)) is not None:
        if claim.lease.id == job_id:
            return claim
    raise AssertionError(f"{job_id} cannot be validated")


def test_a_file_goes_up_and_comes_back_byte_for_byte(api: Api) -> None:
    client = api.openai()

    file = client.files.create(file=TRAINING, purpose="fine-tune")

    assert (file.object, file.filename, file.bytes, file.status) == (
        "file",
        "train.jsonl",
        len(TRAINING[1]),
        "uploaded",
    )
    assert client.files.content(file.id).read() == TRAINING[1]
    assert file.id in [one.id for one in client.files.list(limit=5)]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_files_page_through_even_when_the_cursor_was_deleted(api: Api) -> None:
    client = api.openai()
    made = [upload(api) for _ in range(3)]
    client.files.delete(made[1])

    following = client.files.list(after=made[1], order="desc", limit=100).data

    assert made[0] in [one.id for one in following]
    assert made[2] not in [one.id for one in following]


def test_a_job_is_accepted_with_openais_fields_and_ours_under_one_key(api: Api) -> None:
    client = api.openai()

    job = client.fine_tuning.jobs.create(
        model="smollm2-135m-instruct",
        training_file=upload(api),
        suffix="tickets",
        seed=7,
        metadata={"git_sha": "deadbeef"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        extra_body={"tunepool": {"adapter": {"method": "qlora", "r": 8}}},
    )

    assert (job.status, job.seed, job.metadata, job.fine_tuned_model) == (
        "validating_files",
        7,
        {"git_sha": "deadbeef"},
        None,
    )
    assert job.hyperparameters.n_epochs == 2
    assert job.hyperparameters.batch_size == "auto"
    assert job.model_extra is not None
    assert set(job.model_extra["tunepool"]) >= {"spec", "auto", "queue", "progress", "attempts", "adapter", "usage"}
    assert client.fine_tuning.jobs.retrieve(job.id).id == job.id


@pytest.mark.parametrize(
    ("suffix", "kept"),
    [
        ("my model", "my-model"),
        ("Größe: 7", "Grosse-7"),
        ("v1.2_a-B", "v1.2_a-B"),
        ("../evil", "evil"),
        ("a" * 64, "a" * 64),
    ],
)
def test_a_suffix_of_any_text_becomes_part_of_a_name_and_is_told(api: Api, suffix: str, kept: str) -> None:
    job = api.openai().fine_tuning.jobs.retrieve(submit(api, suffix=suffix))

    assert job.model_extra is not None
    assert job.model_extra["tunepool"]["suffix"] == kept


def test_jobs_are_listed_by_status_and_without_metadata_as_both_sdks_ask(api: Api) -> None:
    plain, cancelled, labelled = submit(api), submit(api), submit(api, metadata={"a": "b"})
    api.openai().fine_tuning.jobs.cancel(cancelled)

    def listed(query: str) -> set[str]:
        with api.http() as http:
            page = http.get(f"/v1/fine_tuning/jobs?limit=100&{query}").json()
        return {job["id"] for job in page["data"]} & {plain, cancelled, labelled}

    assert listed("status=cancelled") == {cancelled}
    assert listed("status=validating_files") == {plain, labelled}
    assert listed("metadata=") == listed("metadata=null") == {plain, cancelled}  # the Node client's null, and Python's


def test_a_running_job_says_that_it_is_being_cancelled(api: Api) -> None:
    job_id = submit(api)
    training = start(api, job_id)
    api.openai().fine_tuning.jobs.cancel(job_id)

    job = api.openai().fine_tuning.jobs.retrieve(job_id)
    with session_scope(api.engine) as session:
        moves.confirm_cancelled(session, training.lease, exit_code=EXIT_STOPPED)

    assert job.model_extra is not None
    assert job.model_extra["tunepool"]["cancel_requested_at"] >= job.created_at
    assert job.model_extra["tunepool"]["pause_requested_at"] is None


def test_a_job_lives_and_its_adapter_can_be_listed_and_withdrawn(api: Api) -> None:
    client = api.openai()
    job_id = submit(api, suffix="life")
    run_to_success(api, job_id)

    job = client.fine_tuning.jobs.retrieve(job_id)
    events = client.fine_tuning.jobs.list_events(job_id, limit=100).data
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job_id).data
    assert job.status == "succeeded"
    assert (
        job.fine_tuned_model
        == f"ft:smollm2-135m-instruct:{api.caller.organization_name}:life:{job_id.removeprefix('ftjob-')}"
    )
    assert job.trained_tokens == 40
    assert events[0].message == "The job has successfully completed"
    assert events[-1].message == f"Created fine-tuning job: {job_id}"
    assert [(one.step_number, one.metrics.train_loss) for one in checkpoints] == [(1, 0.5)]
    assert checkpoints[0].fine_tuned_model_checkpoint == f"{job.fine_tuned_model}:ckpt-step-1"

    assert job.fine_tuned_model in [model.id for model in client.models.list()]
    assert client.models.retrieve(job.fine_tuned_model).owned_by == api.caller.organization_name
    assert client.models.delete(job.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(job.fine_tuned_model)


def test_jobs_page_through_and_filter_by_metadata(api: Api) -> None:
    client = api.openai()
    marked = [submit(api, metadata={"ref": "main", "n": str(n)}) for n in range(3)]

    listed = [job.id for job in client.fine_tuning.jobs.list(limit=2, metadata={"ref": "main"})]
    one = [job.id for job in client.fine_tuning.jobs.list(metadata={"ref": "main", "n": "1"})]

    assert listed == list(reversed(marked))
    assert one == [marked[1]]


def test_a_waiting_job_is_cancelled_at_once_and_twice_is_fine(api: Api) -> None:
    client = api.openai()
    job_id = submit(api)

    assert client.fine_tuning.jobs.cancel(job_id).status == "cancelled"
    assert client.fine_tuning.jobs.cancel(job_id).status == "cancelled"


def test_a_file_in_use_is_refused_once_and_not_retried(api: Api) -> None:
    client = api.openai()
    job = client.fine_tuning.jobs.retrieve(submit(api))

    with pytest.raises(openai.ConflictError) as refused:
        client.files.delete(job.training_file)

    assert refused.value.response.headers["x-should-retry"] == "false"
    assert refused.value.request.headers["x-stainless-retry-count"] == "0"


def test_errors_carry_code_param_and_request_id(api: Api) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        submit(api, model="smollm2-135m-instruct", training_file="file-none")

    assert (refused.value.param, refused.value.code) == ("training_file", "file_not_found")
    assert refused.value.request_id is not None
    assert refused.value.request_id.startswith("req_")


def test_an_unknown_model_names_those_there_are(api: Api) -> None:
    with pytest.raises(openai.NotFoundError, match="smollm2-135m-instruct") as refused:
        submit(api, model="gpt-9")

    assert refused.value.param == "model"


def test_an_adapter_lists_its_files_with_links_that_work_without_a_key(api: Api) -> None:
    job_id = submit(api, suffix="links")
    run_to_success(api, job_id)
    open_store(api.settings).put_bytes("made/adapter/adapter_model.safetensors", b"weights")
    name = api.openai().fine_tuning.jobs.retrieve(job_id).fine_tuned_model

    with api.http() as http:
        adapter = http.get(f"/v1/tunepool/adapters/{name}").json()
        (file,) = adapter["files"]
        fetched = http.get(file["url"], headers={"Authorization": ""})
        tampered = http.get(file["url"][:-2] + "xx", headers={"Authorization": ""})

    assert adapter["location"] == f"{api.settings.storage}/made/adapter"
    served = {verdict["server"]: (verdict["servable"], verdict["reason"]) for verdict in adapter["servable"]}
    assert served["peft"] == (True, None)
    assert served["vllm"] == (True, "Start it with --enable-lora --max-lora-rank 16.")
    assert fetched.content == b"weights"
    assert hashlib.sha256(fetched.content).hexdigest() == file["sha256"]
    assert fetched.headers["content-disposition"].startswith("attachment")
    assert (tampered.status_code, tampered.json()["error"]["code"]) == (403, "invalid_link")


def test_an_adapter_without_files_is_shown_as_that(api: Api) -> None:
    job_id = submit(api, suffix="empty")
    run_to_success(api, job_id)
    name = api.openai().fine_tuning.jobs.retrieve(job_id).fine_tuned_model
    with session_scope(api.engine) as session:
        empty = {"prefix": "made/adapter", "files": []}
        session.execute(update(AdapterRow).where(AdapterRow.name == name).values(manifest=empty))

    with api.http() as http:
        answer = http.get(f"/v1/tunepool/adapters/{name}")

    assert (answer.status_code, answer.json()["files"], answer.json()["location"]) == (200, [], "")


def test_a_checkpoint_is_a_model_and_its_own_adapter_can_be_downloaded(api: Api) -> None:
    job_id = submit(api, suffix="checkpoints")
    run_to_success(api, job_id)
    (checkpoint,) = api.openai().fine_tuning.jobs.checkpoints.list(job_id).data
    described = {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    manifest = {
        "prefix": "made/checkpoint",
        "files": [{"name": "adapter/adapter_model.safetensors", **described}, {"name": "optimizer.pt", **described}],
    }
    with session_scope(api.engine) as session:
        session.execute(update(CheckpointRow).where(CheckpointRow.id == checkpoint.id).values(manifest=manifest))
    open_store(api.settings).put_bytes("made/checkpoint/adapter/adapter_model.safetensors", b"weights")

    with api.http() as http:
        by_name, by_id = (
            http.get(f"/v1/tunepool/adapters/{one}").json()
            for one in (checkpoint.fine_tuned_model_checkpoint, checkpoint.id)
        )
        fetched = http.get(by_name["files"][0]["url"], headers={"Authorization": ""})

    assert api.openai().models.retrieve(checkpoint.fine_tuned_model_checkpoint).object == "model"
    assert (by_name["id"], by_name["job_id"], by_name["name"]) == (checkpoint.id, job_id, by_id["name"])
    assert [file["name"] for file in by_name["files"]] == ["adapter_model.safetensors"]
    assert fetched.content == b"weights"


def test_the_clients_own_retries_after_a_lost_answer_make_one_job(api: Api) -> None:
    """The answer of the first try is lost on its way back; the client tries again by itself."""
    lost: list[str] = []

    class LosesTheFirstAnswer(httpx2.HTTPTransport):
        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            answer = super().handle_request(request)
            if request.method == "POST" and not lost:
                answer.read()
                lost.append(answer.json()["id"])
                raise httpx2.ReadError("connection reset", request=request)
            return answer

    file = upload(api)
    with httpx2.Client(transport=LosesTheFirstAnswer()) as transport:
        client = openai.OpenAI(base_url=f"{api.url}/v1", api_key=api.key, http_client=transport)
        job = client.fine_tuning.jobs.create(model="smollm2-135m-instruct", training_file=file)

    assert [job.id] == lost
    assert [one.id for one in api.openai().fine_tuning.jobs.list(limit=100) if one.training_file == file] == [job.id]


def test_events_page_through_to_the_last_with_the_clients_own_iterator(api: Api) -> None:
    job_id = submit(api)
    api.openai().fine_tuning.jobs.cancel(job_id)

    messages = [event.message for event in api.openai().fine_tuning.jobs.list_events(job_id, limit=1)]

    assert len(messages) >= 3
    assert messages[-1] == f"Created fine-tuning job: {job_id}"


def test_a_finished_job_cannot_be_cancelled_and_the_client_is_told_why(api: Api) -> None:
    job_id = submit(api)
    run_to_success(api, job_id)

    with pytest.raises(openai.BadRequestError) as refused:
        api.openai().fine_tuning.jobs.cancel(job_id)

    assert refused.value.code == "job_already_finished"


def test_jobs_without_metadata_can_be_asked_for(api: Api) -> None:
    bare, marked = submit(api), submit(api, metadata={"only": "here", "empty": ""})

    with api.http() as http:
        without = [job["id"] for job in http.get("/v1/fine_tuning/jobs?metadata=null&limit=100").json()["data"]]
        empty = [job["id"] for job in http.get("/v1/fine_tuning/jobs?metadata%5Bempty%5D=").json()["data"]]

    assert bare in without
    assert marked not in without
    assert empty == [marked]
