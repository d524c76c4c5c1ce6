"""Verbs of deliveries to webhooks: who sends which, what came of it, and when it is tried again.

At least once, and in order for each job: a later event of a job waits until the earlier one is delivered or given up.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from shared.errors import NotFound
from shared.ids import new_id
from shared.lease import lease as leasing
from shared.lease.lease import Kind
from shared.lease.turns import Work
from shared.lease.values import Lease
from shared.store import paging
from shared.store.tables import DeliveryRow, JobRow, WebhookRow
from shared.tenants import webhooks

# From an event until it is given up; seconds between tries, the last one again and again, each spread by a fifth.
GIVEN_UP_AFTER: Final = timedelta(days=3)
WAITS: Final = (5, 30, 120, 600, 1800, 3600, 7200, 14400, 28800)
SPREAD: Final = 0.2
# After a failure nobody is sent to the webhook for so long: one that hangs does not take up a worker.
REST_SECONDS: Final = 5.0
KEPT: Final = timedelta(days=30)
MAX_LOG: Final = 20
GONE: Final = 410

_EARLIER = aliased(DeliveryRow)
_READY: Final = (
    select(WebhookRow.id)
    .where(
        WebhookRow.id == DeliveryRow.webhook_id,
        WebhookRow.enabled,
        WebhookRow.deleted_at.is_(None),
        or_(WebhookRow.rests_until.is_(None), WebhookRow.rests_until < func.now()),
    )
    .exists()
    & ~select(_EARLIER.id)
    .where(
        _EARLIER.webhook_id == DeliveryRow.webhook_id,
        _EARLIER.job_id == DeliveryRow.job_id,
        _EARLIER.state == "waiting",
        _EARLIER.id < DeliveryRow.id,
    )
    .exists()
)
DELIVERY: Final = Kind(
    name="delivery",
    row=DeliveryRow,
    open=DeliveryRow.state == "waiting",
    lost={"state": "failed", "finished_at": func.now()},
    ready=_READY,
    cancelled={"state": "failed", "finished_at": func.now(), "next_try_at": None},
)
WORK: Final = Work(DELIVERY)


@dataclass(frozen=True, slots=True)
class Delivery:
    """The right to send an event: where to, what, and the encrypted secrets that sign it."""

    lease: Lease
    webhook_id: str
    url: str
    event_id: str
    body: str
    secrets: tuple[str, ...]
    tries: int
    since: datetime


@dataclass(frozen=True, slots=True)
class SendResult:
    """What came of a try. `status`: of the answer, None where there was none; `error`: what was wrong, else None."""

    status: int | None
    seconds: float
    error: str | None = None

    @property
    def taken(self) -> bool:
        return self.error is None


def claim(
    session: Session, *, worker_id: str, lease_seconds: float, passed_over: Collection[str] = ()
) -> Delivery | None:
    """Lease the next event that may be sent now, or None."""
    row = leasing.take(session, DELIVERY, worker_id=worker_id, lease_seconds=lease_seconds, passed_over=passed_over)
    if row is None:
        return None
    webhook = session.get_one(WebhookRow, row.webhook_id)
    still = session.scalar(select(WebhookRow.former_until > func.now()).where(WebhookRow.id == webhook.id))
    former = (webhook.former_secret,) if webhook.former_secret and still else ()
    return Delivery(
        lease=DELIVERY.lease(row),
        webhook_id=webhook.id,
        url=webhook.url,
        event_id=row.event_id,
        body=json.dumps(body(session, row, rich=webhook.rich), separators=(",", ":")),
        secrets=(webhook.secret, *former),
        tries=row.tries,
        since=row.created_at,
    )


def body(session: Session, row: DeliveryRow, *, rich: bool) -> dict[str, Any]:
    """OpenAI's body of the event; a rich one says under `data.tunepool` how the job stands, which is final."""
    data: dict[str, Any] = {"id": row.job_id or row.subject or webhooks.TEST_JOB}
    if rich and row.details is not None:
        data["tunepool"] = row.details
    job = session.get(JobRow, row.job_id) if rich and row.job_id else None
    if job is not None:
        data["tunepool"] = {
            "status": job.status,
            "model": job.base_model,
            "fine_tuned_model": job.fine_tuned_model,
            "error": job.error,
            "trained_tokens": job.trained_tokens,
            "metadata": job.request.get("metadata"),
            "finished_at": None if job.finished_at is None else int(job.finished_at.timestamp()),
        }
    at = int(row.event_at.timestamp())
    return {"id": row.event_id, "object": "event", "created_at": at, "type": row.event_type, "data": data}


def finish(session: Session, delivery: Delivery, outcome: SendResult) -> bool:
    """Note the try: delivered, or again later, or given up. False: the lease is lost.

    A webhook whose deliveries have failed for three days, or that answers 410, is disabled, and its view says why.
    """
    # Read, not a column: the row is written by the statement that checks the lease.
    row = session.get_one(DeliveryRow, delivery.lease.id, populate_existing=True)
    noted: dict[str, Any] = {"log": _log(session, row, outcome), "tries": row.tries + 1, "next_try_at": None}
    webhook = update(WebhookRow).where(WebhookRow.id == delivery.webhook_id)
    if outcome.taken:
        kept = leasing.end(session, DELIVERY, delivery.lease, state="delivered", finished_at=func.now(), **noted)
        if kept:
            counted = {"delivered_count": WebhookRow.delivered_count + 1}
            session.execute(webhook.values(failing_since=None, rests_until=None, **counted))
        return kept
    since = func.coalesce(WebhookRow.failing_since, func.now())
    over = session.scalars(select(DeliveryRow.created_at < func.now() - GIVEN_UP_AFTER).where(_is(row))).one()
    given_up = over or outcome.status == GONE
    if given_up:
        kept = leasing.end(session, DELIVERY, delivery.lease, state="failed", finished_at=func.now(), **noted)
    else:
        seconds = wait_seconds(row.tries)
        noted["next_try_at"] = func.now() + timedelta(seconds=seconds)
        kept = leasing.postpone(session, DELIVERY, delivery.lease, seconds=seconds, **noted)
    if kept:
        rests = func.now() + timedelta(seconds=REST_SECONDS)
        column = WebhookRow.given_up_count if given_up else WebhookRow.failed_count
        session.execute(webhook.values({column: column + 1, "failing_since": since, "rests_until": rests}))
        _disable_when_dead(session, delivery, outcome)
    return kept


def _is(row: DeliveryRow) -> Any:
    return DeliveryRow.id == row.id


def wait_seconds(tries: int) -> float:
    """Until the next try, after `tries` earlier ones, in seconds."""
    wait = WAITS[min(tries, len(WAITS) - 1)]
    return wait * random.uniform(1 - SPREAD, 1 + SPREAD)  # noqa: S311  # spreading load, no secret


def _log(session: Session, row: DeliveryRow, outcome: SendResult) -> list[dict[str, Any]]:
    now = session.scalars(select(func.now())).one()
    entry = {"at": int(now.timestamp()), "status": outcome.status, "error": outcome.error}
    return [*row.log, {**entry, "seconds": round(outcome.seconds, 3)}][-MAX_LOG:]


def _disable_when_dead(session: Session, delivery: Delivery, outcome: SendResult) -> None:
    reason = None
    if outcome.status == GONE:
        reason = "It answered 410: it wants no more deliveries."
    dead = select(WebhookRow.failing_since < func.now() - GIVEN_UP_AFTER).where(WebhookRow.id == delivery.webhook_id)
    if reason is None and session.scalars(dead).one():
        reason = f"Nothing could be delivered for three days. Last: {outcome.error}"
    if reason is not None:
        webhooks.disable(session, delivery.webhook_id, reason=reason)


def page(
    session: Session, webhook_id: str, *, project_id: str, after: str | None, limit: int
) -> tuple[Sequence[DeliveryRow], bool]:
    """Deliveries of a webhook, newest first, and whether more follow. Raises NotFound."""
    webhook = webhooks.find(session, webhook_id, project_id=project_id)
    of_webhook = DeliveryRow.webhook_id == webhook.id
    return paging.page(session, select(DeliveryRow), DeliveryRow.id, of_webhook, after=after, limit=limit)


def replay(session: Session, webhook_id: str, delivery_id: str, *, project_id: str) -> DeliveryRow:
    """Send an event once more, whatever became of it: the same id and body. Raises NotFound."""
    webhook = webhooks.find(session, webhook_id, project_id=project_id)
    row = session.get(DeliveryRow, delivery_id)
    if row is None or row.webhook_id != webhook.id:
        raise NotFound(f"The webhook has no delivery '{delivery_id[:100]}'.", param="delivery_id")
    return _add(session, webhook, event_id=row.event_id, event_type=row.event_type, job_id=row.job_id, of=row)


def test(session: Session, webhook_id: str, event_type: str, *, project_id: str) -> DeliveryRow:
    """Send an event of a job that never was. Raises NotFound."""
    webhook = webhooks.find(session, webhook_id, project_id=project_id)
    return _add(session, webhook, event_id=new_id("evt_"), event_type=event_type)


def _add(
    session: Session,
    webhook: WebhookRow,
    *,
    event_id: str,
    event_type: str,
    job_id: str | None = None,
    of: DeliveryRow | None = None,
) -> DeliveryRow:
    webhooks.must_be_enabled(webhook)
    row = DeliveryRow(
        id=new_id("delivery_"),
        project_id=webhook.project_id,
        webhook_id=webhook.id,
        event_id=event_id,
        event_type=event_type,
        job_id=job_id,
    )
    if of is not None:
        row.event_at, row.subject, row.details = of.event_at, of.subject, of.details
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def forget(session: Session, *, limit: int = 10_000) -> None:
    """Remove deliveries that ended a month ago."""
    old = select(DeliveryRow.id).where(DeliveryRow.finished_at < func.now() - KEPT).limit(limit)
    session.execute(delete(DeliveryRow).where(DeliveryRow.id.in_(old)))
