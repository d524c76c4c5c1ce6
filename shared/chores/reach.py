"""Whose work a caller may end."""

from __future__ import annotations

from sqlalchemy import inspect, select
from sqlalchemy.orm import Session

from shared.lease.lease import Kind
from shared.tenants.keys import Caller


def project_of(session: Session, kind: Kind, row_id: str, *, caller: Caller) -> str:
    """The project in which the caller ends a piece of work: its own.

    An administrator ends what waits or is at work in every project: it may hold what others wait for. What has ended
    is its owner's alone.
    """
    if not caller.operates:
        return caller.project_id
    owner = inspect(kind.row).columns["project_id"]
    theirs: str | None = session.scalar(select(owner).where(kind.row.id == row_id, kind.open))
    return theirs or caller.project_id
