"""What handlers depend on: one `Door` per process, and the caller of each request."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from api.admission import Admission
from api.bell import RingThread
from api.direct_route import Threads
from api.links import Links
from api.measures import Measures
from api.plan_cache import PlanCache
from api.streams import Streams
from api.vllm import Vllm
from shared.chores import starting
from shared.contract.parent_model import ParentModel
from shared.contract.spec import BaseModelRef
from shared.errors import Unauthenticated
from shared.settings import Settings
from shared.settle.catalogue import Catalogue
from shared.store.db import reading_scope, session_scope
from shared.store.lifecycle import Lane
from shared.store.storage import Store
from shared.tenants import keys
from shared.tenants.id_tokens import IdTokens
from shared.tenants.keys import Caller


@dataclass
class Door:
    """The process's engine, store and settings. A handler opens short sessions on it."""

    settings: Settings
    engine: Engine
    store: Store
    links: Links
    streams: Streams
    bell: RingThread
    outlook: PlanCache
    admission: Admission
    vllm: Vllm | None
    id_tokens: IdTokens
    measures: Measures
    threads: Threads

    def session(self) -> AbstractContextManager[Session]:
        """A session that commits when the block ends, before the answer is sent."""
        return session_scope(self.engine)

    def reading(self) -> AbstractContextManager[Session]:
        """A session for single reads: each statement is its own transaction, which saves two round trips."""
        return reading_scope(self.engine)

    def caller(self, request: Request, *, scope: str | None = None) -> Caller:
        """The owner of the request's key, who has the scope. Raises Unauthenticated, Forbidden, LimitReached."""
        caller = self.admission.caller(self.engine.connect, request, bearer_of(request))
        self.admission.count(request, caller)
        if scope is not None:
            caller.must(scope)
        return caller

    @property
    def catalogue(self) -> Catalogue:
        """Every base model, as it stands now."""
        return starting.catalogue(self.session, self.settings)

    def base_model(self, name: str) -> BaseModelRef:
        """The base model of that name or alias. Raises NotFound, NotYet, Invalid."""
        return starting.base_model(self.session, self.settings, name)

    def start(self, name: str, *, project_id: str) -> tuple[BaseModelRef, ParentModel | None]:
        """The base model that a job trains; and where `name` is a tuned model's, the tuned model that it goes on from.

        Raises NotFound, NotYet, Invalid, and Conflict when the base of a tuned model is gone or another.
        """
        return starting.start(self.session, self.settings, name, project_id=project_id)

    def ring(self, lane: Lane) -> None:
        self.bell.ring(lane)


def door_of(request: Request) -> Door:
    door: Door = request.app.state.door
    return door


async def get_door(request: Request) -> Door:  # async: a plain function would cost a change of threads
    return door_of(request)


DoorDep = Annotated[Door, Depends(get_door)]


def bearer_of(request: Request) -> str:
    """The key that a request brings. Raises Unauthenticated when it brings none, or brings it wrongly."""
    headers = request.headers.getlist("authorization")
    azure = request.headers.getlist("api-key")  # of Azure's clients, who send that alone
    if not headers and len(azure) == 1 and azure[0].strip():
        return azure[0].strip()
    if not headers:
        raise Unauthenticated(
            "You didn't provide an API key. Send it in an Authorization header: Authorization: Bearer YOUR_KEY.",
            code="missing_api_key",
        )
    scheme, _, bearer = headers[0].partition(" ")
    if len(headers) > 1 or scheme.lower() != "bearer":
        raise Unauthenticated("Send exactly one Authorization header, of the form 'Bearer YOUR_KEY'.")
    return bearer.strip()


def get_caller(request: Request, door: DoorDep) -> Caller:
    """The owner of the bearer key. Raises Unauthenticated, LimitReached."""
    return door.caller(request)


CallerDep = Annotated[Caller, Depends(get_caller)]


class Needs:
    """A caller whose key has a scope: `Annotated[Caller, Depends(Needs("jobs:read"))]`."""

    def __init__(self, scope: str) -> None:
        self._scope = scope

    async def __call__(self, caller: CallerDep) -> Caller:  # async like `get_door`
        caller.must(self._scope)
        return caller


JobsReader = Annotated[Caller, Depends(Needs("jobs:read"))]
JobsWriter = Annotated[Caller, Depends(Needs("jobs:write"))]
FilesReader = Annotated[Caller, Depends(Needs("files:read"))]
FilesWriter = Annotated[Caller, Depends(Needs("files:write"))]
ModelsReader = Annotated[Caller, Depends(Needs("models:read"))]
ModelsWriter = Annotated[Caller, Depends(Needs("models:write"))]
ProjectOwner = Annotated[Caller, Depends(Needs("*"))]
Administrator = Annotated[Caller, Depends(Needs(keys.ADMIN))]
