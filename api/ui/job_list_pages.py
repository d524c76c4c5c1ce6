"""/ui/jobs: the project's jobs, by filters that stand in the address."""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode

from fastapi import APIRouter, Request, Response

from api.deps import Door, DoorDep
from api.ui import rendering, visits, wording
from api.ui.job_pages import title_of
from api.ui.visits import JobsVisitor, Visitor
from api.views import job_views
from shared.errors import Invalid
from shared.jobs import pages
from shared.store.lifecycle import JOB_STATUSES
from shared.tenants import projects
from shared.tenants.keys import ADMIN
from shared.tenants.sign_ins import SignedIn

router = APIRouter(prefix="/ui", route_class=visits.PageRoute, include_in_schema=False)

ROWS: Final = 50
_PAIR: Final = re.compile(r"([^=]{1,64})=(.{0,512})", re.DOTALL)


class JobFilter(NamedTuple):
    """Which jobs a visitor asks for; None: any."""

    status: str | None
    model: str | None
    group: str | None
    metadata: str | None  # key=value
    after: str | None
    project: str | None = None  # another than one's own needs the scope admin

    def query(self, **other: str | None) -> str:
        """The address's query with these filters, other ones replaced."""
        values = {**self._asdict(), **other}
        return urlencode({name: value for name, value in values.items() if value})

    @property
    def any(self) -> bool:
        return any((self.status, self.model, self.group, self.metadata, self.project))

    def pairs(self) -> dict[str, str] | None:
        if self.metadata is None:
            return None
        pair = _PAIR.fullmatch(self.metadata)
        if pair is None:
            raise Invalid("Write metadata as key=value.", param="metadata")
        return {pair[1]: pair[2]}


def wanted(request: Request) -> JobFilter:
    """The filters of an address. Raises Invalid."""
    given = {name: (request.query_params.get(name) or "").strip()[:600] or None for name in JobFilter._fields}
    if given["status"] is not None and given["status"] not in JOB_STATUSES:
        raise Invalid(f"'status' must be one of {', '.join(JOB_STATUSES)}.", param="status")
    return JobFilter(**given)


@router.get("")
def front(visit: Visitor) -> Response:
    return visits.back("/ui/jobs" if visit.caller.may("jobs:read") else "/ui/account")


@router.get("/jobs")
def jobs_page(request: Request, door: DoorDep, visit: JobsVisitor) -> Response:
    asked = wanted(request)
    statuses = [("", "any"), *((status, wording.status_word(status)) for status in JOB_STATUSES)]
    offered = _projects(door, visit) if visit.caller.operates else []
    return rendering.page(
        request, visit, "jobs.html", **_listed(door, visit, asked), statuses=statuses, projects=offered
    )


def _projects(door: Door, visit: SignedIn) -> list[tuple[str, str]]:
    """What the filter offers: pairs of an id, empty for the visitor's own project, and its words."""
    with door.reading() as session:
        rows = [(row.id, f"{row.name} · {rendering.short(row.id)}") for row in projects.listed(session)]
    return [("" if project_id == visit.caller.project_id else project_id, words) for project_id, words in rows]


def rows_fragment(door: Door, visit: SignedIn, asked: JobFilter) -> str:
    return rendering.fragment("job_rows.html", visit, **_listed(door, visit, asked))


def _listed(door: Door, visit: SignedIn, asked: JobFilter) -> dict[str, Any]:
    """Raises Forbidden for another project's without the scope admin."""
    project_id = asked.project or visit.caller.project_id
    own = project_id == visit.caller.project_id
    if not own:
        visit.caller.must(ADMIN)
    with door.reading() as session:
        rows, more = pages.jobs(
            session,
            project_id=project_id,
            after=asked.after,
            limit=ROWS,
            metadata=asked.pairs(),
            without_metadata=False,
            status=asked.status,
            model=asked.model,
            group=asked.group,
        )
    jobs = [job_views.job(row, caller=visit.caller) for row in rows]
    return {
        "jobs": [(job, title_of(job), wording.progress(job)) for job in jobs],
        "more": more,
        "wanted": asked,
        "own": own,
    }
