"""Sends events to webhooks, signed as Standard Webhooks says."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Final

import structlog
from standardwebhooks.webhooks import Webhook

from shared.chores import deliveries
from shared.chores.deliveries import DELIVERY, Delivery, SendResult
from shared.errors import Invalid
from shared.settings import Settings
from shared.tenants import outward
from shared.tenants.secret_box import SecretBox
from worker.chores import pinned_line
from worker.chores.run_program import LeaseWatch, under_lease
from worker.host.host import Host

log = structlog.get_logger()

AGENT: Final = f"tunepool/{version('tunepool-server')}"


def send_next(host: Host) -> bool:
    """Send one event that may be sent now, if any. False: there was none."""
    due = host.claim(partial(deliveries.claim, worker_id=host.worker.id, lease_seconds=host.settings.lease_seconds))
    return due is not None and under_lease(host, DELIVERY, due.lease, partial(_send, host, due))


def _send(host: Host, due: Delivery, _watch: LeaseWatch) -> None:
    outcome = send(due, host.settings)
    host.write_in_the_end(lambda s: deliveries.finish(s, due, outcome))
    log.info("webhook.sent", webhook=due.webhook_id, event=due.event_id, status=outcome.status, error=outcome.error)


def send(due: Delivery, settings: Settings) -> SendResult:
    """One try."""
    try:
        headers = signed(due, SecretBox(settings), at=datetime.now(UTC))
    except Invalid as error:  # a worker without the key, or with another one
        return SendResult(None, 0.0, f"The worker could not sign it ({error.code}).")
    return pinned_line.post(
        due.url,
        due.body.encode(),
        headers,
        allowed=outward.networks(settings.webhook_networks),
        seconds=settings.webhook_seconds,
    )


def signed(due: Delivery, box: SecretBox, *, at: datetime) -> dict[str, str]:
    """The headers: the time is that of this try, the id that of the event. Raises Invalid without the right key."""
    signatures = [Webhook(box.open(secret)).sign(due.event_id, at, due.body) for secret in due.secrets]
    return {
        "Content-Type": "application/json",
        "User-Agent": AGENT,
        "webhook-id": due.event_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": " ".join(signatures),
    }
