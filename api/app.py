"""The HTTP door: the only place where its parts are wired together."""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import Engine

from api import errors, freed_memory, openapi_document, operations
from api.admission import Admission
from api.bell import RingThread
from api.compression import GzipJson
from api.concurrency_limit import ConcurrencyLimit
from api.cross_origin import CrossOrigin
from api.deps import Door
from api.direct_route import Threads
from api.links import make_links
from api.measures import Measures
from api.plan_cache import PlanCache
from api.request_id import RequestId
from api.request_url import RequestUrl
from api.routes import (
    adapters,
    aliases,
    catalogue,
    chores,
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
from api.ui import wing
from api.views import error_views
from api.vllm import Vllm
from shared import log
from shared.operating import census, tracing
from shared.operating.census import CountedFigure
from shared.operating.secrecy import hide_secrets
from shared.settings import Settings
from shared.store.bell import ring
from shared.store.db import make_engine, session_scope
from shared.store.storage import open_store
from shared.tenants.id_tokens import IdTokens
from shared.tenants.rates import Rates

if TYPE_CHECKING:
    from shared.operating.spans import Spans

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


# What is asked for most comes first: a request is compared with every router before its own, twice.
PARTS: Final = (
    *(jobs, files, parted_uploads, preflights, graders, models, completions, adapters, aliases, permissions),
    *(objects, merges, evaluations, streams, catalogue, pool, job_operations, projects, oidc, webhooks, usage),
    *(schedules, promotions, exports, evals, chores, job_logs, lineage, sweeps, secrets, signing_keys),
    *(metrics, health, reference),
)


def create_app(settings: Settings) -> FastAPI:
    """The application on these settings. Opens no connection before the first request. Raises ValueError."""
    settings.refuse_half_a_proxy()
    spans = tracing.opened(tracing.API)
    door = _door(settings, spans)
    app = FastAPI(
        title="Tunepool",
        version=version("tunepool-server"),
        description=DESCRIPTION,
        lifespan=_closing(door, spans),
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
    app.add_middleware(RequestId, answered=door.measures.answered, spans=spans)  # added last, so outermost
    errors.install(app)
    for part in PARTS:
        app.include_router(part.router)
    wing.install(app, secure=settings.public_url.startswith("https://"))
    openapi_document.describe(app)
    return app


def _door(settings: Settings, spans: Spans | None) -> Door:
    """What the routes share, put together."""
    engine, store = make_engine(settings.database_url, reads=True), open_store(settings)
    outlook = PlanCache(engine, pool_name=settings.pool)
    return Door(
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
        measures=Measures(
            partial(_census, engine),
            outlook.blocked,
            processes=settings.api_processes,
            spans=None if spans is None else lambda: spans.counts,
        ),
        threads=Threads(),
    )


def _closing(door: Door, spans: Spans | None) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Ends what the door has opened, once the server stops."""

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

    return lifespan


def _census(engine: Engine) -> list[CountedFigure]:
    with session_scope(engine) as session:
        return census.count(session)


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
