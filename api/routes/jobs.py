"""/v1/fine_tuning/jobs: submit, follow, cancel, pause and resume jobs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request, Response

from api.body import body_of, is_short, parse, raw_body, written
from api.deps import Door, DoorDep, JobsReader, JobsWriter, bearer_of, door_of
from api.direct_route import DirectRoute
from api.paging import After, Limit
from api.plan_cache import PlannedPlace
from api.request_span import of_request
from api.views import history_views, job_views, queue_views
from shared import failpoints
from shared.contract.job_request import CreateJob
from shared.errors import Invalid
from shared.fleet import members as gangs
from shared.jobs import integrations, moves, pages, submission
from shared.products import adapters
from shared.store.lifecycle import JobStatus
from shared.tenants import audit
from shared.tenants.keys import Caller

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"], route_class=DirectRoute)

_METADATA: Final = re.compile(r"metadata\[(.*)\]")
_IDEMPOTENCY_KEY: Final = re.compile(r"[\x21-\x7e]{1,255}")
_RETRY_COUNT: Final = re.compile(r"[1-9][0-9]{0,2}")
_TEXT_OR_NOTHING: Final = {"anyOf": [{"type": "string"}, {"type": "null"}]}
JOB_BODY: dict[str, Any] = {
    "parameters": [
        {
            "in": "header",
            "name": "idempotency-key",
            "required": False,
            "schema": {**_TEXT_OR_NOTHING, "title": "Idempotency-Key"},
        }
    ],
    **body_of(
        CreateJob,
        example={
            "model": "smollm2-135m-instruct",
            "training_file": "file-0193a1b2c3d4e5f60718293a4b5c6d7e",
            "suffix": "tickets",
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
            "tunepool": {"adapter": {"method": "qlora", "r": 16}, "training": {"learning_rate": "auto"}},
        },
    ),
}
POLL: dict[str, Any] = {
    "parameters": [
        {"in": "path", "name": "job_id", "required": True, "schema": {"type": "string", "title": "Job Id"}},
        {
            "in": "header",
            "name": "if-none-match",
            "required": False,
            "schema": {**_TEXT_OR_NOTHING, "title": "If-None-Match"},
        },
    ]
}


# Submissions and polls are most of what is asked. They take the request as it comes, and change threads once: FastAPI's
# dependencies cost more processor time than the poll itself, most of it in the one thread that serves every request.


@router.post("", response_model=job_views.FineTuningJob, openapi_extra=JOB_BODY)
async def create_job(request: Request) -> Response:
    """Accept a job. It waits in the queue; nothing trains before its files are found good."""
    door = door_of(request)
    bearer_of(request)
    if not is_short(request):  # nobody's long body is read before their key
        await door.threads.run(door.caller, request, scope="jobs:write")
    body = await raw_body(request)
    return await door.threads.run(_create_job, door, request, body)


def _create_job(door: Door, asked: Request, body: bytes) -> Response:
    caller, headers = door.caller(asked, scope="jobs:write"), asked.headers
    view, answer_headers = submitted(
        door,
        caller,
        body,
        retried=_is_retry(headers.get("x-stainless-retry-count")),
        idempotency_key=_checked_key(headers.get("idempotency-key")),
        traceparent=of_request(asked),
    )
    return written(view, **answer_headers)


def submitted(
    door: Door,
    caller: Caller,
    body: bytes,
    *,
    retried: bool = False,
    idempotency_key: str | None = None,
    traceparent: str | None = None,
) -> tuple[job_views.FineTuningJob, dict[str, str]]:
    """Accept a job: its view, and what the answer says beside it. Raises Invalid, NotYet, LimitReached, Conflict."""
    request = parse(body, CreateJob)
    base, parent = door.start(request.model, project_id=caller.project_id)
    with door.session() as session:
        made = submission.submit(
            session,
            request,
            caller=caller,
            base=base,
            parent=parent,
            request_sha256=hashlib.sha256(body).hexdigest(),
            retried=retried,
            idempotency_key=idempotency_key,
            traceparent=traceparent,
        )
        view = job_views.job(made.job, caller=caller)
        failpoints.reach("submit_before_commit", door.settings)
    failpoints.reach("submit_after_commit", door.settings)
    answer_headers = {}
    if made.replayed:
        answer_headers["idempotent_replayed"] = "true"
    if made.warning is not None:
        answer_headers["tunepool_warning"] = made.warning.encode("ascii", "replace").decode()
    door.ring("cpu")
    return view, answer_headers


def _is_retry(count: str | None) -> bool:
    """Whether the openai client says that it has sent this request before."""
    return count is not None and _RETRY_COUNT.fullmatch(count) is not None


def _checked_key(key: str | None) -> str | None:
    if key is not None and not _IDEMPOTENCY_KEY.fullmatch(key):
        raise Invalid("Idempotency-Key must be 1 to 255 visible ASCII characters.", param="Idempotency-Key")
    return key


@router.get("", response_model=job_views.JobPage)
def list_jobs(
    request: Request,
    door: DoorDep,
    caller: JobsReader,
    after: After = None,
    limit: Limit = 20,
    metadata: Annotated[
        str | None, Query(description="`null` or empty: jobs without metadata. Or `metadata[key]=value`.")
    ] = None,
    status: Annotated[JobStatus | None, Query(description="Jobs in this state only.")] = None,
    include: Annotated[
        list[job_views.Part] | None,
        Query(alias="include[]", description="What each job of the list shall have too; `include=` is the same."),
    ] = None,
    plain_include: Annotated[list[job_views.Part] | None, Query(alias="include", include_in_schema=False)] = None,
) -> Response:
    """Jobs of the project, newest first."""
    wanted = {
        match[1]: value for name, value in request.query_params.multi_items() if (match := _METADATA.fullmatch(name))
    }
    if metadata not in (None, "null", "") or (metadata is not None and wanted):
        raise Invalid(
            "Filter with metadata[key]=value, or metadata=null for jobs without any; not both.", param="metadata"
        )
    with door.reading() as session:
        rows, more = pages.jobs(
            session,
            project_id=caller.project_id,
            after=after,
            limit=limit,
            metadata=wanted or None,
            without_metadata=metadata in ("null", ""),  # the Node client writes null as nothing
            status=status,
        )
    parts = frozenset([*(include or ()), *(plain_include or ())])
    data = [job_views.job(row, caller=caller, queue=queue_views.place(row, door.outlook), parts=parts) for row in rows]
    return written(job_views.JobPage(data=data, has_more=more))


@router.get(
    "/{job_id}",
    response_model=job_views.FineTuningJob,
    responses={304: {"description": "Unchanged since the ETag."}},
    openapi_extra=POLL,
)
async def retrieve_job(request: Request) -> Response:
    """A job with its place in the queue, progress, attempts and adapter. Send the ETag back to poll cheaply."""
    job_id, known = request.path_params["job_id"], request.headers.get("if-none-match")
    door = door_of(request)
    return await door.threads.run(_retrieve_job, door, request, job_id, known)


def _retrieve_job(door: Door, request: Request, job_id: str, if_none_match: str | None) -> Response:
    caller = door.caller(request, scope="jobs:read")
    look = None
    if if_none_match is not None:
        with door.reading() as session:
            version, status = pages.job_version(session, job_id, project_id=caller.project_id)
        look = door.outlook.of(job_id) if status == "queued" else None
        etag = queue_views.etag(version, look)
        if _is_known(etag, if_none_match):
            return Response(status_code=304, headers={"ETag": etag})
    view, etag = whole_job(door, caller, job_id, look)
    return written(view, etag=etag)


def whole_job(
    door: Door, caller: Caller, job_id: str, look: PlannedPlace | None = None
) -> tuple[job_views.FineTuningJob, str]:
    """A job with all that surrounds it, and its ETag. `look`: its place, if that is known already. Raises NotFound."""
    with door.reading() as session:
        row = pages.job(session, job_id, project_id=caller.project_id)
        # What has never started has neither: most polls of a full queue.
        attempts = pages.attempts(session, job_id) if row.attempts else ()
        adapter = adapters.of_job(session, job_id) if row.attempts else None
        members = gangs.of_job(session, job_id) if row.nodes > 1 else None
        trackings = integrations.listed(session, row)
    look = (look or door.outlook.of(job_id)) if row.status == "queued" else None  # it may have moved since
    queue = queue_views.cluster_state(row, attempts) if look is None else queue_views.queue_state(look, row)
    around = partial(job_views.job, row, caller=caller, attempts=attempts, members=members, adapter=adapter)
    view = around(queue=queue, trackings=trackings)
    return view, queue_views.etag(row.version, look)


def _is_known(etag: str, if_none_match: str | None) -> bool:
    """Weak comparison (RFC 9110, 13.1.2): proxies that compress turn `"x"` into `W/"x"`."""
    tags = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
    return etag in tags or tags == ["*"]


@router.post("/{job_id}/cancel", response_model=job_views.FineTuningJob)
def cancel_job(job_id: str, door: DoorDep, caller: JobsWriter) -> job_views.FineTuningJob:
    """Cancel at once what waits; what runs is stopped within seconds. Cancelling twice is fine."""
    return _move(door, caller, job_id, moves.request_cancel, verb="job.cancel")


@router.post("/{job_id}/pause", response_model=job_views.FineTuningJob)
def pause_job(job_id: str, door: DoorDep, caller: JobsWriter) -> job_views.FineTuningJob:
    """Hold a waiting job; a running one saves a checkpoint and gives its devices back."""
    return _move(door, caller, job_id, moves.request_pause, verb="job.pause")


@router.post("/{job_id}/resume", response_model=job_views.FineTuningJob)
def resume_job(job_id: str, door: DoorDep, caller: JobsWriter) -> job_views.FineTuningJob:
    """Queue a paused job again; it goes on from its last checkpoint."""
    return _move(door, caller, job_id, moves.resume, verb="job.resume")


def _move(door: Door, caller: Caller, job_id: str, move: Callable[..., Any], *, verb: str) -> job_views.FineTuningJob:
    with door.session() as session:
        view = job_views.job(move(session, job_id, project_id=caller.project_id), caller=caller)
        audit.record(session, caller, verb, job_id, after={"status": view.status})
    door.ring("training")
    return view


@router.get("/{job_id}/events", response_model=history_views.EventPage)
def list_events(
    job_id: str,
    door: DoorDep,
    caller: JobsReader,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> history_views.EventPage:
    """What happened, newest first."""
    with door.session() as session:
        pages.job(session, job_id, project_id=caller.project_id)
        rows, more = pages.events(session, job_id, after=after, limit=limit)
    return history_views.EventPage(data=[history_views.event(row) for row in rows], has_more=more)


@router.get("/{job_id}/checkpoints", response_model=history_views.CheckpointPage)
def list_checkpoints(
    job_id: str,
    door: DoorDep,
    caller: JobsReader,
    after: After = None,
    limit: Limit = 10,
) -> history_views.CheckpointPage:
    """Published checkpoints, newest first."""
    with door.session() as session:
        pages.job(session, job_id, project_id=caller.project_id)
        rows, more = pages.checkpoints(session, job_id, after=after, limit=limit)
    data = [history_views.checkpoint(row) for row in rows]
    return history_views.CheckpointPage(
        data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=more
    )
