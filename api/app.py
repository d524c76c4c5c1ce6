"""The HTTP door: the only place where its parts are wired together."""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Any, Final

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import Engine

from api import (
    alias_bodies,
    errors,
    freed_memory,
    oidc_bodies,
    operations,
    pool_bodies,
    schedule_bodies,
    secret_bodies,
    upload_bodies,
    webhook_bodies,
)
from api.admission import Admission
from api.bell import RingThread
from api.compression import GzipJson
from api.concurrency_limit import ConcurrencyLimit
from api.cross_origin import CrossOrigin
from api.deps import Door
from api.links import make_links
from api.measures import Measures
from api.plan_cache import PlanCache
from api.request_id import RequestId
from api.request_url import RequestUrl
from api.routes import (
    adapters,
    aliases,
    catalogue,
    completions,
    evals,
    evaluations,
    exports,
    files,
    graders,
    health,
    job_logs,
    job_operations,
    jobs,
    lineage,
    merges,
    metrics,
    models,
    objects,
    oidc,
    parted_uploads,
    permissions,
    pool,
    preflights,
    projects,
    promotions,
    reference,
    schedules,
    secrets,
    signing_keys,
    streams,
    sweeps,
    usage,
    webhooks,
)
from api.streams import Streams
from api.threads import Threads
from api.ui import wing
from api.views import completion_views, error_views, job_views
from api.vllm import Vllm
from shared import log
from shared.contract.completions import CreateChatCompletion, CreateCompletion
from shared.contract.evals import CreateEval, CreateEvalRun, UpdateEval
from shared.contract.graders import RunGrader, ValidateGrader
from shared.contract.job_request import CreateJob, CreatePreflight
from shared.operating import census, tracing
from shared.operating.census import CountedFigure
from shared.operating.secrecy import hide_secrets
from shared.settings import Settings
from shared.store.bell import ring
from shared.store.db import make_engine, session_scope
from shared.store.storage import open_store
from shared.tenants.id_tokens import IdTokens
from shared.tenants.rates import Rates

DESCRIPTION = """OpenAI's fine-tuning API on your own GPUs. Point the official `openai` client at it:
`OpenAI(base_url="http://127.0.0.1:8765/v1", api_key="tp_…")`. Everything OpenAI's wire has no word for lies under
the one key `tunepool`, in requests (`extra_body={"tunepool": {…}}`) and in answers."""

# Requests change threads a few times, and each change may wait so long for a thread that computes: the planner, which
# takes 0.2 s for 10,000 waiting jobs. Python's 5 ms would be felt in every poll meanwhile.
SWITCH_SECONDS: Final = 0.0005

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": error_views.ErrorEnvelope, "description": "A field is wrong; `param` names it."},
    401: {"model": error_views.ErrorEnvelope, "description": "No API key, or not a live one."},
    403: {"model": error_views.ErrorEnvelope, "description": "The key lacks a scope."},
    404: {"model": error_views.ErrorEnvelope, "description": "No such thing in this project."},
    409: {"model": error_views.ErrorEnvelope, "description": "Its state forbids this. Not worth retrying."},
    413: {"model": error_views.ErrorEnvelope, "description": "Too many bytes."},
    415: {"model": error_views.ErrorEnvelope, "description": "Wrong content type."},
    422: {"model": error_views.ErrorEnvelope, "description": "The Idempotency-Key was used with another body."},
    429: {"model": error_views.ErrorEnvelope, "description": "A limit is reached."},
    500: {"model": error_views.ErrorEnvelope, "description": "A fault of ours; report it with the x-request-id."},
    503: {"model": error_views.ErrorEnvelope, "description": "A part of the service is away; retry."},
}


def create_app(settings: Settings) -> FastAPI:
    """The application on these settings. Opens no connection before the first request. Raises ValueError."""
    settings.refuse_half_a_proxy()
    engine, store = make_engine(settings.database_url, reads=True), open_store(settings)
    outlook = PlanCache(engine, pool_name=settings.pool)
    spans = tracing.opened(tracing.API)
    measures = Measures(
        partial(_census, engine),
        outlook.blocked,
        processes=settings.api_processes,
        spans=None if spans is None else lambda: spans.counts,
    )
    door = Door(
        settings=settings,
        engine=engine,
        store=store,
        links=make_links(settings),
        streams=Streams(partial(session_scope, engine), limit=settings.max_streams, seconds=settings.stream_seconds),
        outlook=outlook,
        bell=RingThread(partial(ring, settings=settings)),
        admission=Admission(Rates(settings)),
        vllm=Vllm(settings, store) if settings.vllm_url else None,
        id_tokens=IdTokens(settings),
        measures=measures,
        threads=Threads(),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if door.vllm is not None:
            await door.vllm.close()
        door.outlook.close()
        door.bell.close()
        door.threads.close()
        door.admission.rates.close()
        door.engine.dispose()
        if spans is not None:
            await run_in_threadpool(spans.close)

    app = FastAPI(
        title="Tunepool",
        version=version("tunepool-server"),
        description=DESCRIPTION,
        lifespan=lifespan,
        responses=ERRORS,
        generate_unique_id_function=operations.operation_id,
        docs_url=None,  # both of FastAPI's load scripts from another host
        redoc_url=None,
        redirect_slashes=False,  # a redirect would leave the envelope, for whatever host the client named
        # FastAPI's own traces would tell paths and queries; ours (api/request_span.py) hold nothing of strangers' text.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.door = door
    app.add_middleware(GzipJson)
    app.add_middleware(RequestUrl)
    app.add_middleware(ConcurrencyLimit)
    if settings.allowed_origins:
        app.add_middleware(CrossOrigin, origins=settings.allowed_origins)
    app.add_middleware(RequestId, answered=measures.answered, spans=spans)  # added last, so outermost
    errors.install(app)
    for part in (
        jobs,  # first: what is asked for most is found soonest, and each router before it is tried twice
        *(files, parted_uploads, preflights, graders, models, completions, adapters, aliases, permissions),
        *(objects, merges, evaluations, streams, catalogue, pool, job_operations, projects, oidc, webhooks, usage),
        *(schedules, promotions, exports, evals, job_logs, lineage, sweeps, secrets, signing_keys),
        *(metrics, health, reference),
    ):
        app.include_router(part.router)
    wing.install(app, secure=settings.public_url.startswith("https://"))
    _describe(app)
    return app


def _census(engine: Engine) -> list[CountedFigure]:
    with session_scope(engine) as session:
        return census.count(session)


def _describe(app: FastAPI) -> None:
    """Add the bodies that we parse ourselves, and the bearer key, to the OpenAPI document."""
    plain = app.openapi

    def complete() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = plain()
            components = schema["components"]
            parsed = (CreateJob, CreatePreflight, ValidateGrader, RunGrader, CreateChatCompletion, CreateCompletion)
            for body in (
                *parsed,
                *(CreateEval, UpdateEval, CreateEvalRun),
                *pool_bodies.BODIES,
                *alias_bodies.BODIES,
                *upload_bodies.BODIES,
                *webhook_bodies.BODIES,
                *oidc_bodies.BODIES,
                *secret_bodies.BODIES,
                *schedule_bodies.BODIES,
            ):
                reference = body.model_json_schema(ref_template="#/components/schemas/{model}")
                components["schemas"] |= {**reference.pop("$defs", {}), body.__name__: reference}
            # FastAPI drops every null of an example, and these nulls are fields that are always there.
            components["schemas"]["FineTuningJob"]["examples"] = [job_views.JOB_EXAMPLE]
            components["securitySchemes"] = {"ApiKey": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"ApiKey": []}]
            open_paths = ("/v1/tunepool/objects/{token}", "/v1/tunepool/oidc/token", "/v1/tunepool/signing-keys")
            for path in ("/livez", "/readyz", *open_paths):
                for operation in schema["paths"][path].values():
                    operation["security"] = []
            _describe_chunks(schema)
            _correct_streams(schema)
            operations.add_links(schema)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = complete  # type: ignore[method-assign]  # FastAPI's documented way to extend the schema


def _describe_chunks(schema: dict[str, Any]) -> None:
    """Say of routes that stream on request what their events hold."""
    chunk = completion_views.ChatCompletionChunk
    reference = chunk.model_json_schema(ref_template="#/components/schemas/{model}")
    schema["components"]["schemas"] |= {**reference.pop("$defs", {}), chunk.__name__: reference}
    for operation in (operation for path in schema["paths"].values() for operation in path.values()):
        event = operation.pop("x-stream-of", None)
        if event is not None:
            operation["responses"]["200"]["content"]["text/event-stream"] = {"itemSchema": event}


def _correct_streams(schema: dict[str, Any]) -> None:
    """Describe a stream's errors as JSON: they come instead of the stream. FastAPI describes them as streams.

    `itemSchema` is OpenAPI 3.2's; the document is 3.1, whose readers know `schema` only.
    """
    for operation in (operation for path in schema["paths"].values() for operation in path.values()):
        for answer in operation["responses"].values():
            stream = answer.get("content", {}).get("text/event-stream", {})
            if "schema" in stream:
                answer["content"] = {"application/json": stream}
            elif "itemSchema" in stream:
                stream["schema"] = stream.pop("itemSchema")


def app_from_settings() -> FastAPI:
    """For `uvicorn --factory api.app:app_from_settings`."""
    hide_secrets()
    settings = Settings()
    log.configure(settings)
    sys.setswitchinterval(SWITCH_SECONDS)
    freed_memory.keep_a_little()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # of 1,024, the usual soft limit, half requests hold all
    app = create_app(settings)
    # Half a million objects of code, schemas and statements live as long as the process. To look through them takes the
    # collector 0.1 s, in which nobody is answered.
    gc.collect()
    gc.freeze()
    gc.enable()  # api/serve.py had it rest meanwhile
    return app
