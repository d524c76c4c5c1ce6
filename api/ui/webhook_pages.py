"""/ui/webhooks: who is told of ended jobs, with which secret, and what became of it."""

from __future__ import annotations

import json
from typing import Any, Final, get_args

from fastapi import APIRouter, Request, Response

from api.deps import Door, DoorDep
from api.paging import After
from api.routes import webhooks as webhook_routes
from api.ui import rendering, visits
from api.ui.visits import JobsOrderer, JobsVisitor, ProvenForm
from api.webhook_bodies import EventType
from shared.tenants.sign_ins import SignedIn

router = APIRouter(prefix="/ui/webhooks", route_class=visits.PageRoute, include_in_schema=False)

ROWS: Final = 20
EVENT_TYPES: Final = get_args(EventType)


@router.get("")
def webhooks_page(request: Request, door: DoorDep, visit: JobsVisitor) -> Response:
    listed = webhook_routes.list_webhooks(visit.caller, door)
    return rendering.page(request, visit, "webhooks.html", webhooks=listed.data, event_types=EVENT_TYPES)


@router.post("")
def create_webhook(request: Request, door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    """The answer itself shows the secret: nothing can show it again, and no address holds it."""
    body = {
        "name": form.must("name"),
        "url": form.must("url"),
        "event_types": form.all("event_types") or list(EVENT_TYPES),
        "rich": form.get("rich") == "yes",
    }
    made = webhook_routes.create_webhook(visit.caller, json.dumps(body).encode(), door)
    return _webhook(request, door, visit, made.id, secret=made.signing_secret)


@router.get("/{webhook_id}")
def webhook_page(
    webhook_id: str,
    request: Request,
    door: DoorDep,
    visit: JobsVisitor,
    after: After = None,
) -> Response:
    return _webhook(request, door, visit, webhook_id, after=after)


def _webhook(
    request: Request, door: Door, visit: SignedIn, webhook_id: str, *, secret: str = "", after: str | None = None
) -> Response:
    webhook = webhook_routes.retrieve_webhook(webhook_id, visit.caller, door)
    listed = webhook_routes.list_deliveries(webhook_id, visit.caller, door, after=after, limit=ROWS)
    values: dict[str, Any] = {"deliveries": listed.data, "more": listed.has_more, "after": after}
    return rendering.page(
        request, visit, "webhook.html", webhook=webhook, secret=secret, event_types=EVENT_TYPES, **values
    )


@router.post("/{webhook_id}/test")
def send_test(webhook_id: str, door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    body = {"event_type": form.get("event_type") or EVENT_TYPES[0]}
    webhook_routes.test_webhook(webhook_id, visit.caller, json.dumps(body).encode(), door)
    return visits.back(f"/ui/webhooks/{webhook_id}")


@router.post("/{webhook_id}/rotate")
def rotate_secret(webhook_id: str, request: Request, door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    body = {"keep_old_secret_active_for_24_hours": form.get("keep") == "yes"}
    made = webhook_routes.rotate_webhook(webhook_id, visit.caller, json.dumps(body).encode(), door)
    return _webhook(request, door, visit, webhook_id, secret=made.signing_secret)


@router.post("/{webhook_id}/enable")
def enable_webhook(webhook_id: str, door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    webhook_routes.enable_webhook(webhook_id, visit.caller, door)
    return visits.back(f"/ui/webhooks/{webhook_id}")


@router.post("/{webhook_id}/disable")
def disable_webhook(webhook_id: str, door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    webhook_routes.disable_webhook(webhook_id, visit.caller, door)
    return visits.back(f"/ui/webhooks/{webhook_id}")


@router.post("/{webhook_id}/delete")
def delete_webhook(webhook_id: str, door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    webhook_routes.delete_webhook(webhook_id, visit.caller, door)
    return visits.back("/ui/webhooks")


@router.post("/{webhook_id}/deliveries/{delivery_id}/replay")
def replay_delivery(webhook_id: str, delivery_id: str, door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    webhook_routes.replay_delivery(webhook_id, delivery_id, visit.caller, door)
    return visits.back(f"/ui/webhooks/{webhook_id}")
