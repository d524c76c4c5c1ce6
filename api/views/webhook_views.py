"""Views of webhooks and of what is delivered to them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from api.views.view import View, maybe_seconds, seconds
from shared.store.tables import DeliveryRow, WebhookRow


class WebhookEndpoint(View):
    id: str = Field(examples=["webhook_0193a1b2c3d4e5f60718293a4b5c6d7e"])
    object: Literal["tunepool.webhook"] = "tunepool.webhook"
    name: str
    url: str
    event_types: list[str]
    rich: bool = Field(description="Bodies say under `data.tunepool` how the job ended.")
    signing_secret_hint: str = Field(description="The last characters of the secret.")
    enabled: bool
    disabled_reason: str | None = Field(description="Why nothing is sent; three days of failures disable a webhook.")
    failing_since: int | None = Field(description="Null: the last delivery was taken.")
    created_at: int
    updated_at: int


class NewWebhookEndpoint(WebhookEndpoint):
    signing_secret: str = Field(description="`whsec_…`; shown here, and never again.")


class WebhookPage(View):
    object: Literal["list"] = "list"
    data: list[WebhookEndpoint]


class DeliveryTry(View):
    at: int
    status: int | None = Field(description="Of the answer; null: there was none.")
    error: str | None = Field(description="Null: it was taken.")
    seconds: float


class WebhookDelivery(View):
    id: str
    object: Literal["tunepool.webhook.delivery"] = "tunepool.webhook.delivery"
    webhook_id: str
    event_id: str = Field(description="The header webhook-id: the same for all tries and replays.")
    event_type: str
    job_id: str | None = Field(description="Null: a test.")
    state: Literal["waiting", "delivered", "failed"]
    tries: int
    log: list[DeliveryTry] = Field(description="The last twenty tries.")
    next_try_at: int | None
    created_at: int
    finished_at: int | None


class DeliveryPage(View):
    object: Literal["list"] = "list"
    data: list[WebhookDelivery]
    has_more: bool


def webhook(row: WebhookRow) -> WebhookEndpoint:
    return WebhookEndpoint.model_validate(_values(row))


def new_webhook(row: WebhookRow, secret: str) -> NewWebhookEndpoint:
    return NewWebhookEndpoint.model_validate({**_values(row), "signing_secret": secret})


def _values(row: WebhookRow) -> dict[str, object]:
    return {
        "id": row.id,
        "name": row.name,
        "url": row.url,
        "event_types": row.event_types,
        "rich": row.rich,
        "signing_secret_hint": row.secret_hint,
        "enabled": row.enabled,
        "disabled_reason": row.disabled_reason,
        "failing_since": maybe_seconds(row.failing_since),
        "created_at": seconds(row.created_at),
        "updated_at": seconds(row.updated_at),
    }


def delivery(row: DeliveryRow) -> WebhookDelivery:
    return WebhookDelivery.model_validate(
        {
            "id": row.id,
            "webhook_id": row.webhook_id,
            "event_id": row.event_id,
            "event_type": row.event_type,
            "job_id": row.job_id,
            "state": row.state,
            "tries": row.tries,
            "log": row.log,
            "next_try_at": maybe_seconds(row.next_try_at),
            "created_at": seconds(row.created_at),
            "finished_at": maybe_seconds(row.finished_at),
        }
    )
