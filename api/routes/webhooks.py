"""/v1/tunepool/webhooks: who is told of a project's ended jobs, and what became of it."""

from __future__ import annotations

from fastapi import APIRouter

from api.body import RawBody, body_of, parse
from api.deps import Door, DoorDep, JobsReader, JobsWriter
from api.paging import After, Limit
from api.views import view, webhook_views
from api.webhook_bodies import CreateWebhook, EditWebhook, RotateWebhook, SendTestEvent
from shared.chores import deliveries
from shared.tenants import audit, outward, webhooks
from shared.tenants.keys import Caller
from shared.tenants.secret_box import SecretBox

router = APIRouter(prefix="/v1/tunepool/webhooks", tags=["webhooks"])


@router.post("", response_model=webhook_views.NewWebhookEndpoint, openapi_extra=body_of(CreateWebhook))
def create_webhook(caller: JobsWriter, body: RawBody, door: DoorDep) -> webhook_views.NewWebhookEndpoint:
    """Have an address told of jobs that end. The answer is the only place where its secret is ever seen."""
    wanted = parse(body, CreateWebhook)
    _look_at(door, wanted.url)
    box = SecretBox(door.settings)
    with door.session() as session:
        row, secret = webhooks.create(session, box, project_id=caller.project_id, **wanted.model_dump())
        audit.record(session, caller, "webhook.create", row.id, after={"url": row.url})
        return webhook_views.new_webhook(row, secret)


def _look_at(door: Door, url: str | None) -> None:
    if url is not None:
        outward.target(url, allowed=outward.networks(door.settings.webhook_networks))


@router.get("", response_model=webhook_views.WebhookPage)
def list_webhooks(caller: JobsReader, door: DoorDep) -> webhook_views.WebhookPage:
    """The project's webhooks, oldest first; there are never more than twenty."""
    with door.session() as session:
        rows = webhooks.listed(session, project_id=caller.project_id)
    return webhook_views.WebhookPage(data=[webhook_views.webhook(row) for row in rows])


@router.get("/{webhook_id}", response_model=webhook_views.WebhookEndpoint)
def retrieve_webhook(webhook_id: str, caller: JobsReader, door: DoorDep) -> webhook_views.WebhookEndpoint:
    """One webhook, and whether its deliveries are taken."""
    with door.session() as session:
        return webhook_views.webhook(webhooks.find(session, webhook_id, project_id=caller.project_id))


@router.patch("/{webhook_id}", response_model=webhook_views.WebhookEndpoint, openapi_extra=body_of(EditWebhook))
def edit_webhook(webhook_id: str, caller: JobsWriter, body: RawBody, door: DoorDep) -> webhook_views.WebhookEndpoint:
    """Change what is named; what waits to be delivered goes where it says then."""
    wanted = parse(body, EditWebhook)
    _look_at(door, wanted.url)
    changes = wanted.model_dump(exclude_none=True)
    with door.session() as session:
        row = webhooks.edit(session, webhook_id, changes, project_id=caller.project_id)
        audit.record(session, caller, "webhook.edit", row.id, after=changes)
        return webhook_views.webhook(row)


@router.delete("/{webhook_id}", response_model=view.Deleted)
def delete_webhook(webhook_id: str, caller: JobsWriter, door: DoorDep) -> view.Deleted:
    """Remove a webhook; what waits for it is given up."""
    with door.session() as session:
        row = webhooks.delete(session, webhook_id, project_id=caller.project_id)
        audit.record(session, caller, "webhook.delete", row.id, before={"url": row.url})
    return view.Deleted(id=webhook_id, object="tunepool.webhook")


@router.post("/{webhook_id}/test", response_model=webhook_views.WebhookDelivery, openapi_extra=body_of(SendTestEvent))
def test_webhook(webhook_id: str, caller: JobsWriter, body: RawBody, door: DoorDep) -> webhook_views.WebhookDelivery:
    """Send an event of a job that never was, `ftjob-test`."""
    wanted = parse(body, SendTestEvent)
    with door.session() as session:
        row = deliveries.test(session, webhook_id, wanted.event_type, project_id=caller.project_id)
        answer = webhook_views.delivery(row)
    door.ring("cpu")
    return answer


@router.post(
    "/{webhook_id}/rotate", response_model=webhook_views.NewWebhookEndpoint, openapi_extra=body_of(RotateWebhook)
)
def rotate_webhook(
    webhook_id: str, caller: JobsWriter, body: RawBody, door: DoorDep
) -> webhook_views.NewWebhookEndpoint:
    """A new secret; the old one signs beside it for a day if asked."""
    keep = parse(body, RotateWebhook).keep_old_secret_active_for_24_hours
    box = SecretBox(door.settings)
    with door.session() as session:
        row, secret = webhooks.rotate(session, box, webhook_id, project_id=caller.project_id, keep_former=keep)
        audit.record(session, caller, "webhook.rotate", row.id, after={"keep_former": keep})
        return webhook_views.new_webhook(row, secret)


@router.post("/{webhook_id}/disable", response_model=webhook_views.WebhookEndpoint)
def disable_webhook(webhook_id: str, caller: JobsWriter, door: DoorDep) -> webhook_views.WebhookEndpoint:
    """Send nothing more there; what waits is given up and may be replayed."""
    return _set_enabled(door, caller, webhook_id, enabled=False)


@router.post("/{webhook_id}/enable", response_model=webhook_views.WebhookEndpoint)
def enable_webhook(webhook_id: str, caller: JobsWriter, door: DoorDep) -> webhook_views.WebhookEndpoint:
    """Tell it of jobs that end from now on."""
    return _set_enabled(door, caller, webhook_id, enabled=True)


def _set_enabled(door: Door, caller: Caller, webhook_id: str, *, enabled: bool) -> webhook_views.WebhookEndpoint:
    with door.session() as session:
        row = webhooks.set_enabled(session, webhook_id, project_id=caller.project_id, enabled=enabled)
        audit.record(session, caller, f"webhook.{'enable' if enabled else 'disable'}", row.id)
        return webhook_views.webhook(row)


@router.get("/{webhook_id}/deliveries", response_model=webhook_views.DeliveryPage)
def list_deliveries(
    webhook_id: str,
    caller: JobsReader,
    door: DoorDep,
    after: After = None,
    limit: Limit = 20,
) -> webhook_views.DeliveryPage:
    """What was sent there or waits, newest first. Ended deliveries are kept for 30 days."""
    with door.session() as session:
        rows, more = deliveries.page(session, webhook_id, project_id=caller.project_id, after=after, limit=limit)
    return webhook_views.DeliveryPage(data=[webhook_views.delivery(row) for row in rows], has_more=more)


@router.post("/{webhook_id}/deliveries/{delivery_id}/replay", response_model=webhook_views.WebhookDelivery)
def replay_delivery(
    webhook_id: str, delivery_id: str, caller: JobsWriter, door: DoorDep
) -> webhook_views.WebhookDelivery:
    """Send an event once more: the same id, the same body."""
    with door.session() as session:
        row = deliveries.replay(session, webhook_id, delivery_id, project_id=caller.project_id)
        answer = webhook_views.delivery(row)
    door.ring("cpu")
    return answer
