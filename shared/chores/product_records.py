"""What the maker of a product writes under its lease: merges, combinations, exports and pushes end in the same ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import func
from sqlalchemy.orm import Session

from shared.chores import failing
from shared.contract.documents import error_document
from shared.lease import lease as leasing
from shared.lease.lease import MAX_FAILURES, Kind
from shared.lease.values import Lease
from shared.store.tables import ExportRow, MergeRow

RETRY_AFTER: Final = timedelta(seconds=30)


def kind_of(name: str, row: type[MergeRow] | type[ExportRow]) -> Kind:
    """The kind of lease of a table of products."""
    message = f"Making this ended {MAX_FAILURES} workers, as a rule by taking more memory than there is."
    return Kind(
        name=name,
        row=row,
        open=row.status.in_(["queued", "running"]) & row.deleted_at.is_(None),
        taken={"status": "running"},
        waiting={"status": "queued"},
        lost=failing.failed("worker_lost", message),
        cancelled=failing.failed("cancelled", "It was cancelled before it was made."),
    )


@dataclass(frozen=True, slots=True)
class ProductRecords:
    """The rows of one kind of product, as its maker writes them. Each verb returns False when the lease is lost."""

    kind: Kind
    attempt_prefix: Callable[[str, str, int], str]  # project, product, fence -> under which keys its files lie

    def place(self, project_id: str, lease: Lease) -> str:
        """Under which keys the holder of the lease leaves the files."""
        return self.attempt_prefix(project_id, lease.id, lease.fence)

    def finish(self, session: Session, lease: Lease, *, manifest: dict[str, Any]) -> bool:
        """running -> succeeded: the commit that publishes."""
        return leasing.end(
            session, self.kind, lease, status="succeeded", manifest=manifest, error=None, finished_at=func.now()
        )

    def fail(self, session: Session, lease: Lease, *, code: str, message: str, param: str | None = None) -> bool:
        """running -> failed: trying again would not help."""
        return failing.fail(session, self.kind, lease, code=code, message=message, param=param)

    def give_back(self, session: Session, lease: Lease, *, code: str, message: str) -> bool:
        """running -> queued after something that may pass; failed with it after the last try."""
        seconds = RETRY_AFTER.total_seconds()
        return failing.give_back(session, self.kind, lease, seconds=seconds, code=code, message=message)

    def postpone(self, session: Session, lease: Lease, *, code: str, message: str) -> bool:
        """running -> queued for a while: this host has other work now. It counts as no try."""
        error = error_document(code, message)
        return leasing.postpone(session, self.kind, lease, seconds=RETRY_AFTER.total_seconds(), error=error)
