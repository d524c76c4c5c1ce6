"""What a user asks for: the body of a schedule's request, which nests that of a job.

Pure: pydantic only, no I/O, no clock.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from shared.contract.job_request import CreateJob
from shared.contract.part import Part

Overlap = Literal["skip", "queue", "supersede"]
# One part of a path, as it stands in `tunepool schedule pause NAME`.
ScheduleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class ScheduledJob(CreateJob):
    """The body of `POST /v1/fine_tuning/jobs`, without `training_file` where `data_prefix` names the data."""

    training_file: Annotated[str, StringConstraints(min_length=1, max_length=100)] | None = None  # type: ignore[assignment]  # open until the run

    def on(self, training_file: str, *, metadata: dict[str, str]) -> CreateJob:
        """The job of one run. Raises pydantic.ValidationError when this version takes such a job no more."""
        document = self.model_dump(mode="json", exclude_unset=True)
        labels = {**(self.metadata or {}), **metadata}
        return CreateJob.model_validate({**document, "training_file": training_file, "metadata": labels})


class CreateSchedule(Part):
    """A job that starts at moments of the clock, when data changes, or both: at those moments, on the newest data."""

    name: ScheduleName
    cron: Annotated[str, StringConstraints(min_length=1, max_length=100)] | None = Field(
        default=None, description="Minute, hour, day of month, month, day of week. Null: when the data changes."
    )
    time_zone: Annotated[str, StringConstraints(min_length=1, max_length=64)] = Field(
        default="UTC", description="Of `cron`; a name of the tz database, such as Europe/Berlin."
    )
    data_prefix: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = Field(
        default=None,
        description="Each run trains on the project's newest file whose name begins so. Without `cron` such a file is "
        "what starts a run.",
    )
    overlap: Overlap = Field(
        default="skip",
        description="While the job of an earlier run has not ended: start none, start one that waits in the queue, or "
        "start one and cancel the earlier.",
    )
    skip_unchanged: bool = Field(
        default=True, description="Start nothing while an earlier job had the same data, base and settings."
    )
    job: ScheduledJob
