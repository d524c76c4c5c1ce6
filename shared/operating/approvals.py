"""Approvals of promotions. The last one that is needed has the gate judged again, and moves the alias."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.errors import Conflict, Forbidden, TunepoolError
from shared.operating import promotion
from shared.operating.promotion import PromotionRequest
from shared.products import promotion_requests
from shared.products.gate_checks import GateWish
from shared.store.tables import AliasRow, ApiKeyRow, PromotionRow
from shared.tenants import audit, keys
from shared.tenants.keys import Caller


def approve(session: Session, promotion_id: str, caller: Caller) -> PromotionRow:
    """Consent to a promotion. With the last approval that it needs the alias moves, or the promotion ends without.

    A key consents once; asked again, the answer is as before. A gate that no longer passes, or a model that is gone,
    ends a promotion. That is no error here but a state of the promotion, so it is kept.

    Raises:
        NotFound, Conflict: there is no such promotion, or it has ended.
        Forbidden: the key asked for it itself, or is none of the approvers.
    """
    row, alias = promotion_requests.held(session, promotion_id, project_id=caller.project_id)
    _refuse_ended(session, row)
    if row.key_id == caller.key_id:
        raise Forbidden(
            "This key asked for the promotion; another one approves it.", param="promotion_id", code="own_promotion"
        )
    _refuse_others(alias, caller)
    if promotion_requests.approve(session, row, key_id=caller.key_id):
        after = {"alias": alias.name, "model": row.model}
        audit.record(session, caller, "promotion.approve", row.id, after=after)
    approved_by = promotion_requests.approvals(session, row)
    if len(approved_by) >= alias.approvals:
        _carry_out(session, row, alias, caller, approved_by)
    return row


def withdraw(session: Session, promotion_id: str, caller: Caller, *, reason: str | None) -> PromotionRow:
    """End a promotion without a move: who asked takes it back, who may approve refuses it, or an administrator.

    Raises NotFound, Conflict, Forbidden.
    """
    row, alias = promotion_requests.held(session, promotion_id, project_id=caller.project_id)
    _refuse_ended(session, row)
    if row.key_id != caller.key_id:
        _refuse_others(alias, caller)
    promotion_requests.end(session, row, "withdrawn", by=caller.key_id, outcome=reason)
    audit.record(session, caller, "promotion.withdraw", row.id, after={"alias": alias.name, "reason": reason})
    promotion.tell_end(session, row, alias)
    return row


def expire(session: Session) -> None:
    """End what nobody has approved in time."""
    for promotion_id in promotion_requests.overdue(session):
        project_id = session.get_one(PromotionRow, promotion_id).project_id
        row, alias = promotion_requests.held(session, promotion_id, project_id=project_id)
        if row.state == "pending":
            promotion_requests.end(session, row, "expired")
            promotion.tell_end(session, row, alias)


def _refuse_ended(session: Session, row: PromotionRow) -> None:
    late = session.scalars(select(func.now())).one() >= row.expires_at
    state = "expired" if row.state == "pending" and late else row.state
    if state != "pending":
        why = "" if row.outcome is None else f" {row.outcome}"
        raise Conflict(
            f"Promotion {row.id} is '{state}' and waits for nothing more.{why}",
            param="promotion_id",
            code="promotion_ended",
        )


def _refuse_others(alias: AliasRow, caller: Caller) -> None:
    if alias.approvers is not None and caller.key_id not in alias.approvers and not caller.operates:
        raise Forbidden(
            f"This API key is none of those that approve promotions of {alias.name}.",
            param="promotion_id",
            code="alias_protected",
        )


def _carry_out(session: Session, row: PromotionRow, alias: AliasRow, caller: Caller, approved_by: list[str]) -> None:
    """The move, judged as it would be if it were asked for now by who asked."""
    try:
        with session.begin_nested():
            version = promotion.promote_approved(
                session,
                _wish(row, alias),
                _asker(session, row),
                model_id=row.model_id,
                by=caller,
                approved_by=approved_by,
            )
    except TunepoolError as error:
        state: promotion_requests.End = "overtaken" if error.code == "alias_moved" else "refused"
        promotion_requests.end(session, row, state, by=caller.key_id, outcome=error.message, code=error.code)
    else:
        promotion_requests.end(session, row, "moved", by=caller.key_id, version=version.number)
    promotion.tell_end(session, row, alias)


def _wish(row: PromotionRow, alias: AliasRow) -> PromotionRequest:
    stored: dict[str, Any] = row.wish
    gate = None if stored["gate"] is None else GateWish(**stored["gate"])
    return PromotionRequest(alias.name, stored["model"], gate, row.from_version, stored["force"], row.reason)


def _asker(session: Session, row: PromotionRow) -> Caller:
    """Who asked, with the rights of now. Raises Forbidden when the key has ended."""
    owner = session.execute(keys.OWNERS.where(ApiKeyRow.id == row.key_id)).one_or_none()
    if owner is None:
        raise Forbidden(f"The key that asked, {row.key_id}, is revoked or expired.", code="asker_ended")
    asker = keys.caller_of(owner._mapping)
    asker.must("models:write")
    return asker
