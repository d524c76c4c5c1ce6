"""/ui/playground: a question to one or two models side by side, answered as it is said."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response

from api import errors
from api.body import raw_body
from api.deps import DoorDep
from api.routes import completions as completion_routes
from api.routes import models as model_routes
from api.ui import rendering, visits
from api.ui.visits import ModelsVisitor
from shared.errors import TunepoolError
from shared.products import adapters

router = APIRouter(prefix="/ui/playground", route_class=visits.PageRoute, include_in_schema=False)


@router.get("")
def playground_page(
    request: Request,
    door: DoorDep,
    visit: ModelsVisitor,
    model: Annotated[str | None, Query(max_length=300)] = None,
) -> Response:
    models = model_routes.list_models(door, visit.caller).data
    known = {entry.id for entry in models}
    if model is None:
        model = next((entry.id for entry in models if adapters.is_tuned(entry.id)), None)
    base = next((entry.id for entry in models if model and model.startswith(f"ft:{entry.id}:")), None)
    # A checkpoint is no model of the list, and can be asked all the same.
    names = [*([model] if model and model not in known else []), *(entry.id for entry in models)]
    return rendering.page(
        request,
        visit,
        "playground.html",
        names=names,
        chosen=(base or (names[0] if names else None), model),
        warm={entry.id for entry in models if entry.tunepool.warm},
    )


@router.post("/answers")
async def answer(
    request: Request, visit: ModelsVisitor, x_page_proof: Annotated[str, Header(max_length=100)] = ""
) -> Response:
    """The body and the answer of `POST /v1/chat/completions`, for a visitor. Its errors are the API's."""
    try:
        visits.must_come_from_here(request)
        visit.must_prove(x_page_proof)
        body = await raw_body(request)
        return await completion_routes.answered_chat(request, visit.caller.project_id, body)
    except TunepoolError as error:
        return errors.answer(error)
