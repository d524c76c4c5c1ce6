"""Bodies of the routes that operate a pool. Strict, like every body; a PATCH changes what it names."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints

from shared.contract.part import Part
from shared.contract.spec import Tier

Name = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$")]
Hours = Annotated[float, Field(ge=0.0, le=1e9)]
Devices = Annotated[int, Field(ge=0, le=1_000_000)]
Jobs = Annotated[int, Field(ge=0, le=10_000_000)]
SECONDS_PER_HOUR: Final = 3600.0


class EditPool(Part):
    """Rules of the pool; null goes back to the default. docs/scheduling.md says what each one does."""

    max_wait_seconds: float | None = Field(default=None, ge=0.0, le=365 * 86400.0, description="Then a job has aged.")
    min_runtime_seconds: float | None = Field(
        default=None, ge=0.0, le=30 * 86400.0, description="Nobody is preempted before."
    )
    preempt_grace_seconds: float | None = Field(
        default=None, ge=0.0, le=86400.0, description="Expected from a preemption to a free device."
    )


class EditProject(Part):
    name: Name | None = None
    weight: float | None = Field(default=None, gt=0.0, le=1e6, description="Its part of the pool, beside the others'.")
    guarantee: Devices | None = Field(default=None, description="Devices that are its own when it wants them.")
    max_running: Devices | None = Field(default=None, description="Devices at a time; null: no cap.")
    max_queued: Jobs | None = Field(default=None, description="Waiting jobs; null: no cap.")
    max_bytes: int | None = Field(default=None, ge=0, le=2**62, description="Of files; null: as the service is set.")
    max_files: int | None = Field(default=None, ge=0, le=2**31 - 1, description="Kept; null: as the service is set.")
    budget_gpu_hours: Hours | None = Field(default=None, description="A calendar month (UTC); then jobs wait.")
    budget_soft_gpu_hours: Hours | None = Field(default=None, description="A calendar month (UTC); then it is warned.")


class CreateProject(EditProject):
    name: Name


class EditKey(Part):
    name: Name | None = None
    scopes: list[Annotated[str, StringConstraints(max_length=40)]] | None = Field(
        default=None, min_length=1, max_length=20
    )
    max_running: Devices | None = Field(default=None, description="Devices at a time; null: no cap.")
    max_queued: Jobs | None = Field(default=None, description="Waiting jobs; null: no cap.")
    max_tier: Tier | None = Field(default=None, description="The highest tier that its jobs may ask for.")
    max_priority: int | None = Field(default=None, ge=-100, le=100)
    expires_at: int | None = Field(default=None, ge=0, le=253_402_300_799, description="Unix seconds; null: never.")


class CreateKey(EditKey):
    project_id: Annotated[str, StringConstraints(max_length=100)]
    name: Name


class RotateKey(Part):
    """A new secret for a key."""

    overlap_hours: float = Field(
        default=24.0, ge=0.0, le=720.0, description="So long the secret until now stays valid; 0: it ends at once."
    )


class SetPriority(Part):
    priority: int | None = Field(default=None, ge=-100, le=100, description="Higher goes first inside a project.")
    tier: Tier | None = None


class Quarantine(Part):
    reason: Annotated[str, StringConstraints(max_length=500)] | None = None


class CancelJobs(Part):
    """Which jobs to cancel: all that match every filter that is given. `all` says that no filter is meant."""

    all: bool = False
    statuses: list[Literal["validating_files", "queued", "running", "paused"]] = Field(
        default=["validating_files", "queued", "paused"], min_length=1, max_length=4
    )
    job_ids: list[Annotated[str, StringConstraints(max_length=100)]] = Field(default=[], max_length=10_000)
    group: Annotated[str, StringConstraints(max_length=128)] | None = None
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    project_id: Annotated[str, StringConstraints(max_length=100)] | None = Field(
        default=None, description="Another project's: needs the scope admin."
    )


class AddModel(Part):
    """A base model: a hub's repository, or a folder that every worker's host has at the same place."""

    source: Annotated[str, StringConstraints(min_length=1, max_length=1000)] = Field(
        description="`owner/name` at a hub, or an absolute path."
    )
    revision: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = Field(
        default=None, description="Of a hub: a branch, a tag or a commit; null: main."
    )
    name: Annotated[str, StringConstraints(min_length=1, max_length=100)] | None = Field(
        default=None, description="null: the repository's or the folder's own, in lower case."
    )
    aliases: list[Annotated[str, StringConstraints(min_length=1, max_length=200)]] = Field(
        default=[], max_length=20, description="Further names, such as the OpenAI model that scripts ask for."
    )


BODIES: Final = (
    AddModel,
    EditPool,
    EditProject,
    CreateProject,
    EditKey,
    CreateKey,
    RotateKey,
    SetPriority,
    Quarantine,
    CancelJobs,
)
# Columns that are never null: there, null in a body means "leave it".
_NEVER_NULL: Final = frozenset({"name", "weight", "guarantee", "scopes", "max_tier", "max_priority"})


def changes(body: Part) -> dict[str, Any]:
    """The values of a body under the row's names and units: device-seconds for hours, a datetime for Unix seconds."""
    given = body.model_dump(exclude_unset=True, exclude={"project_id"})
    return dict(_column(name, value) for name, value in given.items() if not (value is None and name in _NEVER_NULL))


def _column(name: str, value: Any) -> tuple[str, Any]:
    if name.endswith("gpu_hours"):
        return name.replace("gpu_hours", "device_seconds"), None if value is None else value * SECONDS_PER_HOUR
    if name == "expires_at" and value is not None:
        return name, datetime.fromtimestamp(value, tz=UTC)
    return name, value
