"""/ui/new and /ui/preflights: from a file to a job, with a look at what it would do before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, get_args

from fastapi import APIRouter, Query, Request, Response

from api.deps import Door, DoorDep
from api.paging import After
from api.request_span import of_request
from api.routes import catalogue as catalogue_routes
from api.routes import files as file_routes
from api.routes import jobs as job_routes
from api.routes import models as model_routes
from api.routes import preflights as preflight_routes
from api.ui import rendering, visits
from api.ui.visits import JobsOrderer, JobsVisitor, ProvenForm, SubmittedForm
from api.views.file_views import File
from shared.chores import preflights
from shared.contract.job_request import CreatePreflight
from shared.contract.spec import DEFAULT_OBJECTIVE, InitFrom, MethodName, ObjectiveName, Tier
from shared.errors import Invalid
from shared.jobs import pages
from shared.products import adapters
from shared.tenants.sign_ins import SignedIn

router = APIRouter(prefix="/ui", route_class=visits.PageRoute, include_in_schema=False)

FILES: Final = 200
# Field of the form -> where it stands in the body.
HYPERPARAMETERS: Final = ("n_epochs", "batch_size")
ADAPTER: Final = ("r", "lora_alpha")
WORDS: Final = ("method", "init_from")
TRAINING: Final = ("learning_rate", "max_length", "max_steps")
QUEUE: Final = ("tier", "group")
# Part of `tunepool` in a body -> its fields in the form.
PARTS: Final = {"adapter": WORDS + ADAPTER, "training": TRAINING, "queue": QUEUE}
WHOLE: Final = ("model", "training_file", "validation_file", "suffix", "seed", "metadata", "more")
FIELDS: Final = frozenset({*WHOLE, *HYPERPARAMETERS, *WORDS, *ADAPTER, *TRAINING, *QUEUE})


@router.get("/new")
def new_job_page(
    request: Request,
    door: DoorDep,
    visit: JobsOrderer,
    like: Annotated[str | None, Query(max_length=100)] = None,
    file: Annotated[str | None, Query(max_length=100)] = None,
) -> Response:
    """An empty form, one filled as another job of the project was asked for, or one that was refused."""
    given: dict[str, str] = {} if file is None else {"training_file": file}
    if like is not None:
        with door.session() as session:
            given = fields_of(pages.job(session, like, project_id=visit.caller.project_id).request)
    return _form(request, door, visit, given)


def _form(request: Request, door: Door, visit: SignedIn, given: dict[str, str]) -> Response:
    caller = visit.caller
    form = rendering.filled(request).at("/ui/new")
    if form.sent:
        given = {name: form.value(name) for name in form.fields}
    may_list = caller.may("files:read"), caller.may("models:read")
    files = file_routes.list_files(door, caller, limit=FILES, purpose="fine-tune").data if may_list[0] else []
    bases = catalogue_routes.list_base_models(door, caller).data if may_list[1] else []
    tuned = [model.id for model in model_routes.list_models(door, caller).data] if may_list[1] else []
    return rendering.page(
        request,
        visit,
        "new_job.html",
        given=given,
        form=form.about(None if form.error is None else field_at_fault(form.error.param, given)),
        files=[(file.id, _words_of(file)) for file in files if file.status != "error"],
        bases=[base for base in bases if base.state != "error"],
        tuned=[name for name in tuned if adapters.is_tuned(name)],
        beginnings=get_args(InitFrom),
        methods=get_args(MethodName),
        objectives=get_args(ObjectiveName),
        tiers=get_args(Tier),
    )


def _words_of(file: File) -> str:
    rows = f" · {rendering.number(file.tunepool.rows)} rows" if file.tunepool.rows else ""
    return f"{file.filename}{rows} · {rendering.short(file.id)}"


def field_at_fault(param: str | None, given: Mapping[str, str]) -> str | None:
    """The form's field that an error is about; None: no field alone, and its words stand above the form."""
    first, *rest = (param or "").split(".")
    match first:
        case "tunepool":
            field = rest[1] if len(rest) > 1 and rest[1] in PARTS.get(rest[0], ()) else "more"
            return "more" if field not in given and "more" in given else field
        case "method" | "hyperparameters":
            return rest[-1] if rest and rest[-1] in HYPERPARAMETERS else "objective"
        case _:
            return first if first in FIELDS else None


def fields_of(body: dict[str, Any]) -> dict[str, str]:
    """The form's fields as a body would fill them; what the form has no field for stands under `more`."""
    ours = {name: dict(part) for name, part in (body.get("tunepool") or {}).items() if isinstance(part, dict)}
    method = body.get("method") or {}
    kind = method.get("type") or DEFAULT_OBJECTIVE
    hyperparameters = (method.get(kind) or {}).get("hyperparameters") or body.get("hyperparameters") or {}
    fields = {name: body.get(name) for name in ("model", "training_file", "validation_file", "suffix", "seed")}
    fields |= {"objective": kind, **{name: hyperparameters.get(name) for name in HYPERPARAMETERS}}
    adapter, training, queue = (ours.get(name, {}) for name in ("adapter", "training", "queue"))
    fields |= {name: adapter.pop(name, None) for name in (*WORDS, *ADAPTER)}
    fields |= {name: training.pop(name, None) for name in TRAINING}
    fields |= {name: queue.pop(name, None) for name in QUEUE}
    more = {name: part for name, part in ours.items() if part}
    fields["metadata"] = "\n".join(f"{name}={value}" for name, value in (body.get("metadata") or {}).items())
    fields["more"] = json.dumps(more, indent=2, ensure_ascii=False) if more else None
    return {name: str(value) for name, value in fields.items() if value not in (None, "", "auto")}


def body_of_form(form: SubmittedForm) -> dict[str, Any]:
    """A job's body as the form asks for it. What is left empty is automatic. Raises Invalid."""
    kind = form.get("objective") or DEFAULT_OBJECTIVE
    hyperparameters = _given({name: form.number(name) for name in HYPERPARAMETERS})
    body: dict[str, Any] = {"model": form.must("model"), "training_file": form.must("training_file")}
    body |= _given({"validation_file": form.get("validation_file"), "suffix": form.get("suffix")})
    body |= _given({"seed": form.number("seed"), "metadata": _metadata(form.get("metadata"))})
    if hyperparameters or kind != DEFAULT_OBJECTIVE:
        body["method"] = {"type": kind, kind: {"hyperparameters": hyperparameters}}
    ours = {
        "adapter": _given({name: form.get(name) for name in WORDS} | {name: form.number(name) for name in ADAPTER}),
        "training": _given({name: form.number(name) for name in TRAINING}),
        "queue": _given({name: form.get(name) for name in QUEUE}),
    }
    for name, part in _more(form.get("more")).items():
        ours[name] = _joined(name, part, ours.get(name, {}))
    ours = {name: part for name, part in ours.items() if part}
    return {**body, "tunepool": ours} if ours else body


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _joined(name: str, part: Any, fields: dict[str, Any]) -> Any:
    """A part of the further options with the form's own fields. Raises Invalid where both name one value."""
    if not isinstance(part, dict):
        return part
    twice = sorted(part.keys() & fields.keys())
    if twice:
        raise Invalid(
            f"'{twice[0]}' has a field of its own in this form, which is filled in too; give it in one place.",
            param=f"tunepool.{name}.{twice[0]}",
        )
    return {**part, **fields}


def _metadata(text: str | None) -> dict[str, str] | None:
    lines = [line for line in (text or "").splitlines() if line.strip()]
    pairs = [line.partition("=") for line in lines]
    if not all(equals and name.strip() for name, equals, _ in pairs):
        raise Invalid("Write metadata as name=value, one a line.", param="metadata")
    return {name.strip(): value.strip() for name, _, value in pairs} or None


def _more(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        more = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"The further options are no JSON: {str(error)[:200]}.", param="more") from None
    if not isinstance(more, dict):
        raise Invalid("The further options must be a JSON object, as under `tunepool` in a request.", param="more")
    return more


@router.post("/new")
def submit_form(request: Request, door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    """Check first, or submit."""
    body = json.dumps(body_of_form(form)).encode()
    if form.get("act") == "check":
        preflight = preflight_routes.create_preflight(visit.caller, body, door)
        return visits.back(f"/ui/preflights/{preflight.id}")
    job, _ = job_routes.submitted(door, visit.caller, body, traceparent=of_request(request))
    return visits.back(f"/ui/jobs/{job.id}")


@router.get("/preflights")
def preflights_page(request: Request, door: DoorDep, visit: JobsVisitor, after: After = None) -> Response:
    listed = preflight_routes.list_preflights(door, visit.caller, after=after)
    return rendering.page(request, visit, "preflights.html", preflights=listed.data, more=listed.has_more)


@router.get("/preflights/{preflight_id}")
def preflight_page(preflight_id: str, request: Request, door: DoorDep, visit: JobsVisitor) -> Response:
    return rendering.page(request, visit, "preflight.html", **preflight_values(door, visit, preflight_id))


def preflight_values(door: Door, visit: SignedIn, preflight_id: str) -> dict[str, Any]:
    preflight = preflight_routes.retrieve_preflight(preflight_id, door, visit.caller)
    report = preflight.report
    bins = report.tokens.training.histogram if report is not None and report.tokens is not None else []
    return {
        "preflight": preflight,
        "report": report,
        "waits": preflight.status in preflights.OPEN,
        "bins": bins,
        "highest": max((entry.rows for entry in bins), default=1) or 1,
    }


@router.post("/preflights/{preflight_id}/submit")
def submit_preflight(preflight_id: str, door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    """The very job that was examined."""
    with door.session() as session:
        row = preflights.find(session, preflight_id, project_id=visit.caller.project_id)
        wanted = CreatePreflight.model_validate(row.request).job()
    body = wanted.model_dump_json(exclude_unset=True).encode()
    job, _ = job_routes.submitted(door, visit.caller, body)
    return visits.back(f"/ui/jobs/{job.id}")


@router.get("/preflights/{preflight_id}/change")
def change_preflight(preflight_id: str, request: Request, door: DoorDep, visit: JobsOrderer) -> Response:
    """The form, filled as the examined job was asked for."""
    with door.session() as session:
        row = preflights.find(session, preflight_id, project_id=visit.caller.project_id)
        given = fields_of(row.request)
    return _form(request, door, visit, given)
