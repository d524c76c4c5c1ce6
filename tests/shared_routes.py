"""What FastAPI makes of our routes is made once in a process, however many applications its tests make.

It works a route out when its router is first asked: the types of 250 routes are 2 s of a core, and their document is as
much again. Each application does so anew, and each file of the integration ring has one or more. No test replaces a
dependency, and all of ours give their routers the same defaults, so what one has worked out holds for all.
tests/integration/test_shared_routes.py compares them.
"""

from __future__ import annotations

import copy
from typing import Any, Final

from fastapi import FastAPI, applications

_included: Final = FastAPI.include_router
_written: Final = applications.get_openapi
# By application and router. The title tells our applications from those that tests make for themselves.
_KNOWN: Final[dict[tuple[str, int], Any]] = {}
_DOCUMENTS: Final[dict[tuple[object, ...], dict[str, Any]]] = {}


def _include_router(app: FastAPI, router: Any, **options: Any) -> None:
    _included(app, router, **options)
    if not options:
        routes = app.router.routes
        routes[-1] = _KNOWN.setdefault((app.title, id(router)), routes[-1])  # it keeps its router, and so the number


def _get_openapi(*, routes: Any, **facts: Any) -> dict[str, Any]:
    """The document of the same routes, written once; each application gets a copy, to which ours add something."""
    shared = {id(route) for route in _KNOWN.values()}
    names = [id(route) if id(route) in shared else getattr(route, "path", None) for route in routes]
    if None in names:  # a router of its own
        return _written(routes=routes, **facts)
    which = (repr(facts), *names)
    if which not in _DOCUMENTS:
        _DOCUMENTS[which] = _written(routes=routes, **facts)
    return copy.deepcopy(_DOCUMENTS[which])


FastAPI.include_router = _include_router  # type: ignore[method-assign]
applications.get_openapi = _get_openapi
