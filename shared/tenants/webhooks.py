"""Webhooks of a project: the addresses that hear of its ended jobs. Deliveries are in shared/chores/deliveries.py."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.errors import Conflict, LimitReached, NotFound
from shared.ids import new_id
from shared.store.locks import one_at_a_time
from shared.store.tables import DeliveryRow, WebhookRow
from shared.tenants.secret_box import SecretBox

MAX_WEBHOOKS: Final = 20
FORMER_SECRET: Final = timedelta(hours=24)
TEST_JOB: Final = "ftjob-test"
BY_HAND: Final = "Disabled by request."
_SECRET_BYTES: Final = 32


def new_secret() -> str:
    """As Standard Webhooks writes it."""
    return f"whsec_{base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()}"


def create(session: Session, box: SecretBox, *, project_id: str, **values: Any) -> tuple[WebhookRow, str]:
    """A webhook and its secret, which nothing shows again. Raises LimitReached, Invalid when nothing is encrypted."""
    secret = new_secret()
    sealed = box.close(secret)
    one_at_a_time(session, f"webhooks:{project_id}")
    if len(listed(session, project_id=project_id)) >= MAX_WEBHOOKS:
        raise LimitReached(
            f"A project has {MAX_WEBHOOKS} webhooks at the most; delete one first.", code="too_many_webhooks"
        )
    row = WebhookRow(id=new_id("webhook_"), project_id=project_id, secret=sealed, secret_hint=secret[-4:], **values)
    session.add(row)
    session.flush()
    session.refresh(row)
    return row, secret


def listed(session: Session, *, project_id: str) -> Sequence[WebhookRow]:
    """The webhooks of a project, oldest first."""
    query = select(WebhookRow).where(WebhookRow.project_id == project_id, WebhookRow.deleted_at.is_(None))
    return session.scalars(query.order_by(WebhookRow.id)).all()


def find(session: Session, webhook_id: str, *, project_id: str, lock: bool = False) -> WebhookRow:
    """Raises NotFound."""
    query = select(WebhookRow).where(
        WebhookRow.id == webhook_id, WebhookRow.project_id == project_id, WebhookRow.deleted_at.is_(None)
    )
    row = session.scalars(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise NotFound(f"No webhook '{webhook_id[:100]}' in this project.", param="webhook_id")
    return row


def edit(session: Session, webhook_id: str, changes: dict[str, Any], *, project_id: str) -> WebhookRow:
    """Change name, url, event_types or rich; deliveries that wait go where it says now. Raises NotFound."""
    row = find(session, webhook_id, project_id=project_id, lock=True)
    for name, value in changes.items():
        setattr(row, name, value)
    return _touched(session, row)


def rotate(
    session: Session, box: SecretBox, webhook_id: str, *, project_id: str, keep_former: bool
) -> tuple[WebhookRow, str]:
    """A new secret; with `keep_former` both sign for 24 hours. Raises NotFound, Invalid when nothing is encrypted."""
    row = find(session, webhook_id, project_id=project_id, lock=True)
    secret = new_secret()
    until = session.scalars(select(func.now())).one() + FORMER_SECRET
    row.former_secret, row.former_until = (row.secret, until) if keep_former else (None, None)
    row.secret, row.secret_hint = box.close(secret), secret[-4:]
    return _touched(session, row), secret


def set_enabled(session: Session, webhook_id: str, *, project_id: str, enabled: bool) -> WebhookRow:
    """Send it messages about jobs that end from now on, or none. Raises NotFound."""
    row = find(session, webhook_id, project_id=project_id, lock=True)
    if not enabled:
        disable(session, row.id, reason=BY_HAND)
        session.refresh(row)
        return row
    row.enabled, row.disabled_reason, row.failing_since, row.rests_until = True, None, None, None
    return _touched(session, row)


def disable(session: Session, webhook_id: str, *, reason: str) -> None:
    """Send nothing more there. What waits is given up, and may be replayed."""
    session.execute(
        update(WebhookRow)
        .where(WebhookRow.id == webhook_id, WebhookRow.enabled)
        .values(enabled=False, disabled_reason=reason, updated_at=func.now())
    )
    _give_up(session, webhook_id)


def delete(session: Session, webhook_id: str, *, project_id: str) -> WebhookRow:
    """Raises NotFound."""
    row = find(session, webhook_id, project_id=project_id, lock=True)
    row.deleted_at = session.scalars(select(func.now())).one()
    session.flush()
    _give_up(session, row.id)
    return row


def must_be_enabled(row: WebhookRow) -> None:
    """Raises Conflict when nothing is sent to it."""
    if not row.enabled:
        raise Conflict(f"Webhook {row.id} is disabled. Enable it first.", code="webhook_disabled")


def _give_up(session: Session, webhook_id: str) -> None:
    session.execute(
        update(DeliveryRow)
        .where(DeliveryRow.webhook_id == webhook_id, DeliveryRow.state == "waiting")
        .values(state="failed", finished_at=func.now(), lease_owner=None, lease_until=None, next_try_at=None)
    )


def _touched(session: Session, row: WebhookRow) -> WebhookRow:
    row.updated_at = session.scalars(select(func.now())).one()
    session.flush()
    return row
