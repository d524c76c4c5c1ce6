"""Messages about ended jobs, written in the transaction that ends them, so that neither is lost without the other."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.orm import Session

from shared.ids import new_id

# OpenAI's names. A job ends once, in one of these.
EVENT_TYPES: Final = ("fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled")
# Ours, of what is no job. `promotion.*`: what needs approvals was asked for, and how that ended.
OTHER_EVENT_TYPES: Final = (
    "tunepool.schedule.refused",
    "tunepool.promotion.requested",
    "tunepool.promotion.ended",
    "tunepool.alias.moved",
)

# Whoever listens is found by the statement that writes: however many jobs, one round trip. The ids of deliveries
# begin with the event's, so that they sort by time.
_TELL: Final = text("""
    insert into webhook_deliveries (id, project_id, webhook_id, event_id, event_type, job_id)
    select 'delivery_' || substr(ended.event_id, 5) || right(webhooks.id, 24),
           webhooks.project_id, webhooks.id, ended.event_id, :event_type, ended.job_id
    from unnest(cast(:job_id as text[]), cast(:event_id as text[])) as ended (job_id, event_id)
         join jobs on jobs.id = ended.job_id
         join webhooks on webhooks.project_id = jobs.project_id
    where webhooks.deleted_at is null and webhooks.enabled and jsonb_exists(webhooks.event_types, :event_type)
""")


def tell(session: Session, job_ids: Collection[str], *, status: str) -> None:
    """Have the webhooks of the jobs' projects told that they have ended so."""
    if job_ids:
        values = {"job_id": list(job_ids), "event_id": [new_id("evt_") for _ in job_ids]}
        session.execute(_TELL, {**values, "event_type": f"fine_tuning.job.{status}"})


_ANNOUNCE: Final = text("""
    insert into webhook_deliveries (id, project_id, webhook_id, event_id, event_type, subject, details)
    select 'delivery_' || substr(:event_id, 5) || right(webhooks.id, 24),
           webhooks.project_id, webhooks.id, :event_id, :event_type, :subject, cast(:details as jsonb)
    from webhooks
    where webhooks.project_id = :project_id and webhooks.deleted_at is null and webhooks.enabled
          and jsonb_exists(webhooks.event_types, :event_type)
""")


def announce(session: Session, event_type: str, subject: str, *, project_id: str, details: dict[str, Any]) -> None:
    """Have the project's webhooks told of one of `OTHER_EVENT_TYPES`. Events of one subject may overtake each other.

    Args:
        subject: the id of what it is of.
        details: JSON, for bodies that are `rich`.
    """
    values = {"event_type": event_type, "subject": subject, "project_id": project_id, "details": json.dumps(details)}
    session.execute(_ANNOUNCE, {**values, "event_id": new_id("evt_")})
