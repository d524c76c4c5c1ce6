"""/v1/tunepool/chores: what the CPU lane has not ended yet, of every kind."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from api.deps import DoorDep, JobsReader, JobsWriter
from api.paging import After, Limit
from api.views import chore_views
from shared.chores import cancelling

router = APIRouter(prefix="/v1/tunepool/chores", tags=["pool"])

KindOf = Annotated[str | None, Query(max_length=40, description="Only this kind, such as merge or file_check.")]


@router.get("", response_model=chore_views.ChorePage)
def list_chores(
    door: DoorDep, caller: JobsReader, after: After = None, limit: Limit = 20, kind: KindOf = None
) -> chore_views.ChorePage:
    """Unfinished checks, preflights, merges, exports, evaluations and the like, by id.

    The project's own; with the scope admin everybody's, and the installation's too.
    """
    with door.session() as session:
        chores, more = cancelling.page(session, caller=caller, kind=kind, after=after, limit=limit)
    return chore_views.ChorePage(data=[chore_views.chore(seen) for seen in chores], has_more=more)


@router.post("/{chore_id}/cancel", response_model=chore_views.Chore)
def cancel_chore(chore_id: str, door: DoorDep, caller: JobsWriter) -> chore_views.Chore:
    """End one of them; what a worker does for it stops within a heartbeat. With the scope admin any.

    Checks of files need the scope files:write, too, merges and exports models:write. The answer is the work as it was.
    """
    with door.session() as session:
        return chore_views.chore(cancelling.cancel(session, chore_id, caller=caller))
