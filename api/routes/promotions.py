"""/v1/tunepool/promotions: promotions of aliases that need approvals."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query

from api.alias_bodies import WithdrawPromotion
from api.body import RawBody, body_of, parse
from api.deps import DoorDep, ModelsReader, ModelsWriter
from api.paging import After, Limit
from api.views import alias_views
from shared.errors import Conflict
from shared.operating import approvals
from shared.products import promotion_requests

router = APIRouter(prefix="/v1/tunepool/promotions", tags=["tunepool"])

State = Literal["pending", "moved", "withdrawn", "expired", "overtaken", "refused"]


@router.get("", response_model=alias_views.PromotionPage)
def list_promotions(
    door: DoorDep,
    caller: ModelsReader,
    state: Annotated[State | None, Query(description="Only those in this state.")] = None,
    after: After = None,
    limit: Limit = 20,
) -> alias_views.PromotionPage:
    """Promotions that needed approvals, newest first."""
    with door.session() as session:
        rows, more = promotion_requests.page(
            session, project_id=caller.project_id, state=state, after=after, limit=limit
        )
        data = [alias_views.promotion(row, alias, promotion_requests.approvals(session, row)) for row, alias in rows]
    return alias_views.PromotionPage(data=data, has_more=more)


@router.get("/{promotion_id}", response_model=alias_views.Promotion)
def retrieve_promotion(promotion_id: str, door: DoorDep, caller: ModelsReader) -> alias_views.Promotion:
    """A promotion: what its gate said, who has approved, and how it ended."""
    with door.session() as session:
        row, alias = promotion_requests.find(session, promotion_id, project_id=caller.project_id)
        return alias_views.promotion(row, alias, promotion_requests.approvals(session, row))


@router.post("/{promotion_id}/approve", response_model=alias_views.Promotion)
def approve_promotion(promotion_id: str, door: DoorDep, caller: ModelsWriter) -> alias_views.Promotion:
    """Approve a promotion that another key has asked for. With the last approval that it needs the alias moves.

    The gate is judged again by then. If it does not pass any more, the model is gone or another move came first, the
    promotion ends, and the answer is a 409 that says so.
    """
    with door.session() as session:
        row = approvals.approve(session, promotion_id, caller)
        _, alias = promotion_requests.find(session, promotion_id, project_id=caller.project_id)
        view = alias_views.promotion(row, alias, promotion_requests.approvals(session, row))
    if view.state in {"refused", "overtaken"}:
        raise Conflict(
            f"The promotion has its approvals, and nothing moved. {view.outcome}", param="promotion_id", code=view.code
        )
    return view


@router.post("/{promotion_id}/withdraw", response_model=alias_views.Promotion, openapi_extra=body_of(WithdrawPromotion))
def withdraw_promotion(promotion_id: str, caller: ModelsWriter, body: RawBody, door: DoorDep) -> alias_views.Promotion:
    """End a promotion without a move. Who asked takes it back; who may approve refuses it."""
    reason = parse(body, WithdrawPromotion).reason
    with door.session() as session:
        row = approvals.withdraw(session, promotion_id, caller, reason=reason)
        _, alias = promotion_requests.find(session, promotion_id, project_id=caller.project_id)
        return alias_views.promotion(row, alias, promotion_requests.approvals(session, row))
