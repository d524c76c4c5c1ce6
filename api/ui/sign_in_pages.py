"""/ui/sign-in and sign-out: a key is shown once; a cookie of the page alone stands for it from then on."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from api.deps import Door, DoorDep
from api.ui import rendering, visits
from api.ui.visits import Form, ProvenForm, Visitor
from shared.errors import LimitReached, TunepoolError, Unauthenticated
from shared.tenants import sign_ins
from shared.tenants.sign_ins import SignedIn

router = APIRouter(prefix="/ui", route_class=visits.PageRoute, include_in_schema=False)


@router.get("/sign-in")
def sign_in_page(request: Request, to: Annotated[str, Query(max_length=2000)] = "/ui") -> Response:
    return rendering.page(request, None, "sign_in.html", to=_inside(to), error=None)


@router.post("/sign-in")
async def sign_in(request: Request, door: DoorDep, form: Annotated[Form, Depends(visits.read_form)]) -> Response:
    """Raises LimitReached for an address that has shown too many bad keys."""
    to = _inside(form.get("to") or "/ui")
    try:
        visit = await run_in_threadpool(_begin, door, request, (form.get("key") or "").strip())
    except (Unauthenticated, LimitReached) as error:
        return _again(request, error, to)
    answer = visits.back(to)
    visits.set_cookie(answer, visit.token, settings=door.settings, secure=visits.is_secure(request, door.settings))
    return answer


def _begin(door: Door, request: Request, key: str) -> SignedIn:
    with door.reading() as session:
        caller = door.admission.caller(session, request, key)
    door.admission.count(request, caller)
    with door.session() as session:
        return sign_ins.begin(session, caller)


def _again(request: Request, error: TunepoolError, to: str) -> Response:
    status = 429 if isinstance(error, LimitReached) else 401
    return rendering.page(request, None, "sign_in.html", status=status, to=to, error=error)


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
