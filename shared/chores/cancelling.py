"""Work of the CPU lane that has not ended, of every kind: listed, and ended by its owner or an administrator.

The verbs go over the table of chores. A kind that is added there is listed and ended here by that alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Select, literal, select, true, union_all
from sqlalchemy.orm import Session

from shared.chores import table
from shared.errors import Invalid, NotFound
from shared.jobs.rows import touch
from shared.lease import lease
from shared.lease.lease import Kind
from shared.store import paging
from shared.store.tables import TrackingRow
from shared.tenants import audit
from shared.tenants.keys import Caller
from shared.tenants.plain_text import printable

# The scope by which a project's keys make such work; whatever stands in no line needs that of jobs.
SCOPES: Final = {"file_check": "files:write", "merge": "models:write", "export": "models:write"}
USUAL_SCOPE: Final = "jobs:write"


@dataclass(frozen=True, slots=True)
class OpenChore:
    """Work that waits, or that a worker holds. `project_id` is empty for the installation's own."""

    id: str
    kind: str
    project_id: str
    worker_id: str | None
    failures: int  # workers it has ended, and tries that failed


def page(
    session: Session, *, caller: Caller, kind: str | None = None, after: str | None = None, limit: int
) -> tuple[Sequence[OpenChore], bool]:
    """What has not ended, by id, and whether more follows: the caller's own, or everybody's for an administrator.

    Raises Invalid for a kind that there is not.
    """
    kinds = {each.name: each for each in table.kinds()}
    if kind is not None and kind not in kinds:
        known = ", ".join(sorted(kinds))
        raise Invalid(f"'kind' is {printable(kind[:40])!r}; it must be one of {known}.", param="kind")
    rows = union_all(*(_open(each, caller) for name, each in kinds.items() if kind in {None, name})).subquery()
    query = select(rows).order_by(rows.c.id).limit(limit + 1)
    if after is not None:
        query = query.where(rows.c.id > after)
    return paging.cut([OpenChore(**row) for row in session.execute(query).mappings()], limit)


def _open(kind: Kind, caller: Caller) -> Select[*tuple[Any, ...]]:
    row, mine = kind.row, true() if caller.operates else kind.row.project_id == caller.project_id
    columns = (
        row.id,
        literal(kind.name).label("kind"),
        row.project_id,
        row.lease_owner.label("worker_id"),
        row.failures,
    )
    return select(*columns).where(kind.open, mine)


def cancel(session: Session, chore_id: str, *, caller: Caller) -> OpenChore:
    """End work that has not ended; what a worker does for it stops within a heartbeat. Audited.

    Raises NotFound, too where it has ended, or is another project's and the caller is no administrator; Forbidden.
    """
    for kind in table.kinds():
        owner: str | None = session.scalar(
            select(kind.row.project_id).where(kind.row.id == chore_id, kind.open).with_for_update()
        )
        if owner is None:
            continue
        if not caller.operates:
            if owner != caller.project_id:
                break
            caller.must(SCOPES.get(kind.name, USUAL_SCOPE))
        worker = session.scalar(select(kind.row.lease_owner).where(kind.row.id == chore_id))
        row = lease.cancel(session, kind, chore_id)
        assert row is not None, "it was locked while it had work left"
        if isinstance(row, TrackingRow):
            touch(session, row.job_id)
        audit.record(session, caller, f"{kind.name}.cancel", chore_id, before={"project_id": owner})
        return OpenChore(chore_id, kind.name, owner, worker, row.failures)
    raise NotFound(
        f"No unfinished work '{chore_id[:100]}'; GET /v1/tunepool/chores lists what has not ended.", param="chore_id"
    )
