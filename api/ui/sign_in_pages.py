"""/ui/sign-in and sign-out: a visitor enters a key once; from then on a cookie stands for it, for the page only."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from api.deps import Door, DoorDep
from api.ui import proxied, rendering, visits
from api.ui.visits import ProvenForm, SubmittedForm, Visitor
from shared.errors import LimitReached, TunepoolError, Unauthenticated
from shared.tenants import projects, sign_ins
from shared.tenants.sign_ins import SignedIn

router = APIRouter(prefix="/ui", route_class=visits.PageRoute, include_in_schema=False)


@router.get("/sign-in")
def sign_in_page(request: Request, door: DoorDep, to: Annotated[str, Query(max_length=2000)] = "/ui") -> Response:
    return _asked(request, door, to=_inside(to))


def _asked(request: Request, door: Door, *, to: str, error: TunepoolError | None = None, status: int = 200) -> Response:
    """The page of the sign-in; somebody who came through the proxy is asked which key to go on with."""
    person, offered = proxied.person(request, door.settings), []
    if person is not None:
        with door.reading() as session:
            names = {row.id: row.name for row in projects.listed(session)}
            offered = [(row.id, names[row.project_id]) for row in sign_ins.keys_of(session, person)]
    return rendering.page(
        request, None, "sign_in.html", status=status, to=to, error=error, person=person, offered=offered
    )


@router.post("/sign-in/proxy")
def sign_in_by_proxy(
    request: Request, door: DoorDep, form: Annotated[SubmittedForm, Depends(visits.read_form)]
) -> Response:
    """As the key that stands for whom the proxy names. Nothing is taken from the browser but the choice of it."""
    to, person = _inside(form.get("to") or "/ui"), proxied.person(request, door.settings)
    if person is None:
        error = Unauthenticated("This did not come through the proxy that signs people in.", code="no_proxy")
        return _asked(request, door, to=to, error=error, status=401)
    try:
        with door.session() as session:
            visit = sign_ins.begin_by_proxy(session, form.must("key"), person=person)
    except Unauthenticated as error:
        return _asked(request, door, to=to, error=error, status=401)
    return _signed_in(request, door, visit, to)


@router.post("/sign-in")
async def sign_in(
    request: Request, door: DoorDep, form: Annotated[SubmittedForm, Depends(visits.read_form)]
) -> Response:
    """Raises LimitReached for an address that has shown too many bad keys."""
    to = _inside(form.get("to") or "/ui")
    try:
        visit = await run_in_threadpool(_begin, door, request, (form.get("key") or "").strip())
    except (Unauthenticated, LimitReached) as error:
        status = 429 if isinstance(error, LimitReached) else 401
        return await run_in_threadpool(_asked, request, door, to=to, error=error, status=status)
    return _signed_in(request, door, visit, to)


def _signed_in(request: Request, door: Door, visit: SignedIn, to: str) -> Response:
    answer = visits.back(to)
    visits.set_cookie(answer, visit.token, settings=door.settings, secure=visits.is_secure(request, door.settings))
    return answer


def _begin(door: Door, request: Request, key: str) -> SignedIn:
    caller = door.admission.caller(door.engine.connect, request, key)
    door.admission.count(request, caller)
    with door.session() as session:
        return sign_ins.begin(session, caller)


def _inside(path: str) -> str:
    """Only our own pages: a sign-in never leads to a stranger's site."""
    inside = path.startswith("/ui") and path[3:4] in ("", "/", "?") and "\\" not in path and path.isprintable()
    return path if inside and not path.startswith(visits.SIGN_IN) else "/ui"


@router.post("/sign-out")
def sign_out(request: Request, door: DoorDep, visit: Visitor, form: ProvenForm) -> Response:
    everywhere = form.get("everywhere") == "yes"
    with door.session() as session:
        sign_ins.end(session, visit, everywhere=everywhere)
    answer = visits.back(visits.SIGN_IN)
    answer.delete_cookie(visits.COOKIE, path="/ui", httponly=True, samesite="strict")
    return answer


@router.get("/account")
def account(request: Request, door: DoorDep, visit: Visitor) -> Response:
    """Who is signed in, and where else."""
    with door.session() as session:
        browsers = sign_ins.count(session, visit.caller.key_id, door.settings)
    return rendering.page(request, visit, "account.html", browsers=browsers, settings=door.settings)
