"""Bodies of the routes of webhooks. Strict, like every body."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints

from api.pool_bodies import Name
from shared.contract.part import Part

EventType = Literal[
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "tunepool.schedule.refused",
    "tunepool.promotion.requested",
    "tunepool.promotion.ended",
    "tunepool.alias.moved",
]
Url = Annotated[str, StringConstraints(min_length=1, max_length=2000)]
EventTypes = Annotated[list[EventType], Field(min_length=1, max_length=7)]


class CreateWebhook(Part):
    """Where ended jobs of the project, and what else it listens for, are told to."""

    name: Name
    url: Url = Field(description="https://host[:port]/path, on the public internet.")
    event_types: EventTypes
    rich: bool = Field(default=False, description="Say under `data.tunepool` how the job ended.")


class EditWebhook(Part):
    """What is named changes."""

    name: Name | None = None
    url: Url | None = None
    event_types: EventTypes | None = None
    rich: bool | None = None


class RotateWebhook(Part):
    """A new secret."""

    keep_old_secret_active_for_24_hours: bool = Field(default=False, description="Both sign meanwhile.")


class SendTestEvent(Part):
    """An event of a job that never was."""

    event_type: EventType


BODIES: Final = (CreateWebhook, EditWebhook, RotateWebhook, SendTestEvent)
