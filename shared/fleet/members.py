"""The leader and the members of a gang talk through these rows. Nothing here moves a job or holds a lease.

Everything is guarded by the attempt being open under its fence: who finds it closed has nothing to say any more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import Session

from shared.contract.documents import error_document
from shared.lease.values import Lease, MeetingPlace, Member, Membership
from shared.store.lifecycle import MemberPhase
from shared.store.tables import AttemptRow, JobRow, MemberRow, WorkerRow

RESTARTED: Final = error_document("member_lost", "its worker was started anew")


@dataclass(frozen=True, slots=True)
class MemberState:
    """A member's last report."""

    node: int
    host: str
    phase: MemberPhase
    heard_at: datetime
    leaving: bool
    exit_code: int | None
    error: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class MemberAnswer:
    """The answer to a member that is needed; with the meeting point once all are ready."""

    place: MeetingPlace | None


@dataclass(frozen=True, slots=True)
class Seat:
    """A host of an attempt that runs on several; node 0 leads."""

    job_id: str
    node: int
    worker_id: str
    host: str
    device_ids: tuple[str, ...]
    phase: str


def seats(session: Session, *, pool_name: str) -> list[Seat]:
    """The hosts of all attempts of a pool that run on several now: job by job, in the order of their numbers."""
    rows = session.execute(
        select(AttemptRow, MemberRow, WorkerRow.host)
        .join(MemberRow, (MemberRow.job_id == AttemptRow.job_id) & (MemberRow.number == AttemptRow.number))
        .join(WorkerRow, WorkerRow.id == AttemptRow.worker_id)
        .where(AttemptRow.ended_at.is_(None), WorkerRow.pool == pool_name)
        .order_by(AttemptRow.job_id, MemberRow.node)
    )
    by_place: dict[tuple[str, int], Seat] = {}
    for attempt, member, host in rows:
        ids, job_id = tuple(member.device_ids), attempt.job_id
        by_place[job_id, member.node] = Seat(job_id, member.node, member.worker_id, member.host, ids, member.phase)
        leader = by_place.setdefault(
            (job_id, 0), Seat(job_id, 0, attempt.worker_id, host, tuple(attempt.device_ids), attempt.phase)
        )
        own = tuple(device_id for device_id in leader.device_ids if device_id not in ids)
        by_place[job_id, 0] = replace(leader, device_ids=own)
    return [by_place[place] for place in sorted(by_place)]


def of_job(session: Session, job_id: str) -> dict[int, list[MemberRow]]:
    """The further hosts of each attempt of a job, by the attempt's number."""
    by_attempt: dict[int, list[MemberRow]] = {}
    rows = select(MemberRow).where(MemberRow.job_id == job_id).order_by(MemberRow.number, MemberRow.node)
    for row in session.scalars(rows):
        by_attempt.setdefault(row.number, []).append(row)
    return by_attempt


# --- the leader ------------------------------------------------------------------------------------------------------


def call(session: Session, lease: Lease, members: Sequence[Member]) -> None:
    """Name the further hosts of an attempt, in the transaction that leases their devices."""
    session.add_all(
        MemberRow(
            job_id=lease.id,
            number=lease.attempt,
            node=member.node,
            worker_id=member.worker_id,
            host=member.host,
            device_ids=list(member.device_ids),
        )
        for member in members
    )
    session.flush()


def states(session: Session, lease: Lease) -> list[MemberState]:
    """The attempt's members in their order."""
    rows = session.scalars(
        select(MemberRow)
        .where(MemberRow.job_id == lease.id, MemberRow.number == lease.attempt)
        .order_by(MemberRow.node)
        .execution_options(populate_existing=True)
    )
    return [
        MemberState(
            node=row.node,
            host=row.host,
            phase=row.phase,  # type: ignore[arg-type]  # text in the row; the check constraint keeps it in the set
            heard_at=row.heard_at,
            leaving=row.leaving,
            exit_code=row.exit_code,
            error=row.error,
        )
        for row in rows
    ]


def meet(session: Session, lease: Lease, place: MeetingPlace) -> bool:
    """Write the meeting point for the members; False when the lease is lost."""
    return _write_attempt(session, lease, meeting=asdict(place))


def dismiss(session: Session, lease: Lease) -> bool:
    """Dismiss the members; False when the lease is lost."""
    return _write_attempt(session, lease, dismissed_at=func.now())


def _write_attempt(session: Session, lease: Lease, **values: Any) -> bool:
    updated = session.execute(update(AttemptRow).where(*_open(lease)).values(**values).returning(AttemptRow.number))
    return updated.one_or_none() is not None


def _open(lease: Lease) -> tuple[ColumnElement[bool], ...]:
    return (AttemptRow.job_id == lease.id, AttemptRow.fence == lease.fence, AttemptRow.ended_at.is_(None))


# --- the members -----------------------------------------------------------------------------------------------------


def called(session: Session) -> dict[str, str]:
    """Workers that are to take part in something and have not answered, each with its pool."""
    rows = session.execute(
        select(MemberRow.worker_id, WorkerRow.pool)
        .join(WorkerRow, WorkerRow.id == MemberRow.worker_id)
        .where(_unanswered())
        .distinct()
    )
    return {row.worker_id: row.pool for row in rows}


def is_called(session: Session, worker_id: str) -> bool:
    """Whether this worker is to take part in something and has not answered."""
    mine = select(MemberRow.node).where(MemberRow.worker_id == worker_id, _unanswered())
    return session.scalars(mine.limit(1)).one_or_none() is not None


def take_call(session: Session, worker_id: str, *, passed_over: Collection[str] = ()) -> MemberRow | None:
    """Answer the oldest call to this worker, but to no job that is `passed_over`; nobody else answers it then."""
    oldest = (
        select(MemberRow)
        .where(MemberRow.worker_id == worker_id, MemberRow.job_id.not_in(passed_over), _unanswered())
        .order_by(MemberRow.heard_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    row = session.scalars(oldest).one_or_none()
    if row is not None:
        row.phase, row.heard_at = "staging", func.now()
        session.flush()
    return row


def _unanswered() -> ColumnElement[bool]:
    needed = select(AttemptRow.number).where(
        AttemptRow.job_id == MemberRow.job_id,
        AttemptRow.number == MemberRow.number,
        AttemptRow.ended_at.is_(None),
        AttemptRow.dismissed_at.is_(None),
    )
    return (MemberRow.phase == "called") & needed.correlate(MemberRow).exists()


def report(session: Session, part: Membership, *, phase: MemberPhase, leaving: bool) -> MemberAnswer | None:
    """Say "still here, so far am I". None: this member is needed no more, and its ranks must end now."""
    session.execute(
        update(MemberRow)
        .where(*_own(part), MemberRow.phase != "ended")
        .values(phase=phase, leaving=leaving, heard_at=func.now())
    )
    row = session.execute(
        select(AttemptRow.meeting)
        .join(JobRow, JobRow.id == AttemptRow.job_id)
        .where(*_open(part.claim.lease), AttemptRow.dismissed_at.is_(None), JobRow.cancel_requested_at.is_(None))
    ).one_or_none()
    if row is None:
        return None
    return MemberAnswer(None if row.meeting is None else MeetingPlace(**row.meeting))


def end(
    session: Session, part: Membership, *, exit_code: int | None = None, error: dict[str, Any] | None = None
) -> None:
    """Say that nothing of this member lives any more; with the exit code if its ranks ended by themselves."""
    session.execute(
        update(MemberRow)
        .where(*_own(part), MemberRow.phase != "ended")
        .values(phase="ended", exit_code=exit_code, error=error, heard_at=func.now())
    )


def _own(part: Membership) -> tuple[ColumnElement[bool], ...]:
    lease = part.claim.lease
    return (MemberRow.job_id == lease.id, MemberRow.number == lease.attempt, MemberRow.node == part.node)


def end_parts_of_restarted(session: Session, worker_id: str) -> None:
    """End every part of a worker that was started anew: nothing of before lives any more."""
    session.execute(update(MemberRow).where(*_parts_of(worker_id)).values(phase="ended", error=RESTARTED))


def retire(session: Session, worker_id: str) -> None:
    """End every part of a worker that has stopped in order; it answers no call any more."""
    session.execute(update(MemberRow).where(*_parts_of(worker_id)).values(phase="ended", leaving=True))


def _parts_of(worker_id: str) -> tuple[ColumnElement[bool], ...]:
    return (MemberRow.worker_id == worker_id, MemberRow.phase != "ended")
