"""/v1/tunepool/usage: device-seconds from leases, by project, key, model and label."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Query, Response

from api.deps import DoorDep, JobsReader
from api.views import usage_views
from shared.tenants import keys, usage

router = APIRouter(prefix="/v1/tunepool", tags=["pool"])

Moment = Annotated[int | None, Query(ge=0, le=253_402_300_799)]
CSV: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "JSON, or with format=csv a table.", "content": {"text/csv": {"schema": {"type": "string"}}}}
}


@router.get("/usage", response_model=usage_views.Usage, responses=CSV)
def report_usage(
    door: DoorDep,
    caller: JobsReader,
    since: Annotated[
        Moment, Query(alias="from", description="Unix seconds; else the start of this month, UTC.")
    ] = None,
    until: Annotated[Moment, Query(alias="to", description="Unix seconds; else now.")] = None,
    group_by: Annotated[
        list[str] | None, Query(max_length=20, description="project, key, model, label:NAME; may be repeated.")
    ] = None,
    project_id: Annotated[str | None, Query(max_length=100, description="Another project: needs admin.")] = None,
    as_format: Annotated[Literal["json", "csv"], Query(alias="format")] = "json",
) -> Any:
    """What leases held, clipped to the span; a key without admin sees its own project only."""
    groups = [name for listed in group_by or ["project"] for name in listed.split(",")]
    whose = project_id if caller.operates else caller.project_id
    if project_id not in (None, caller.project_id):
        caller.must(keys.ADMIN)
    now = datetime.now(UTC)
    start, end = _moment(since, now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)), _moment(until, now)
    with door.session() as session:
        used_groups = usage.report(session, since=start, until=end, group_by=groups, project_id=whose)
    if as_format == "csv":
        return Response(usage.as_csv(used_groups, groups), media_type="text/csv; charset=utf-8")
    return usage_views.Usage(
        since=int(start.timestamp()),
        until=int(end.timestamp()),
        group_by=groups,
        device_seconds=round(sum(group.device_seconds for group in used_groups), 3),
        data=[usage_views.usage_group(group) for group in used_groups],
    )


def _moment(given: int | None, default: datetime) -> datetime:
    return default if given is None else datetime.fromtimestamp(given, tz=UTC)
