"""/v1/tunepool/lineage: the way from data to adapter, merge and alias, and back."""

from __future__ import annotations

from fastapi import APIRouter

from api.deps import DoorDep, ModelsReader
from api.views import lineage_views
from shared.products import lineage

router = APIRouter(prefix="/v1/tunepool", tags=["tunepool"])


@router.get("/lineage/{name}", response_model=lineage_views.LineageView)
def retrieve_lineage(name: str, door: DoorDep, caller: ModelsReader) -> lineage_views.LineageView:
    """What a file, job, tuned model, merge, combination, export, push or alias was made of, and what of it.

    What has been deleted is in it, marked. At most 1,000 things; `truncated` says that there are more.
    """
    with door.session() as session:
        return lineage_views.lineage(lineage.trace(session, name, project_id=caller.project_id))
