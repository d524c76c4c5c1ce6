"""Leases of jobs: for a training with its devices, for a part of one, for the check of a job's files."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final

from pydantic import ValidationError
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.contract.job_request import CreateJob
from shared.contract.spec import JobSpec
from shared.fleet import members as gangs
from shared.fleet import snapshot
from shared.fleet.workers import SILENCE
from shared.jobs import parents, shared_devices
from shared.jobs.rows import model_name
from shared.lease import journal
from shared.lease import lease as leasing
from shared.lease.journal import NewEvent
from shared.lease.lease import Kind
from shared.lease.turns import Work
from shared.lease.values import Claim, FileRef, Lease, Member, Membership, WrittenByNewerVersion, ends_in
from shared.plan.companions import Company, companions
from shared.plan.scheduling import Assignment, Plan
from shared.store.locks import one_at_a_time
from shared.store.tables import AttemptRow, DeviceRow, FileRow, JobRow, WorkerRow
from shared.tenants import usage

_UNCHECKED: Final = select(FileRow.id).where(
    FileRow.id.in_([JobRow.training_file, JobRow.validation_file]),
    FileRow.status == "uploaded",
    FileRow.deleted_at.is_(None),
)
# Jobs whose files are checked and whose values nobody has settled yet. `endings` ends them: nothing is lost silently.
SETTLING: Final = Work(
    Kind(
        name="job",
        row=JobRow,
        open=JobRow.status == "validating_files",
        ready=~_UNCHECKED.correlate(JobRow).exists(),
        taken={"version": JobRow.version + 1},
        waiting={"version": JobRow.version + 1},
        lost={},
    )
)


def claim_training(
    session: Session,
    *,
    worker_id: str,
    pool_name: str,
    lease_seconds: float,
    passed_over: Collection[str] = (),
    left: Collection[str] = (),
    company: Company | None = None,
) -> Claim | None:
    """Lease the next job and its devices to this worker, or None when nothing of the plan is its own.

    Jobs that are `passed_over` are not planned for. Raises WrittenByNewerVersion; the caller passes that job over too.
    What is planned for the devices `left` is not claimed: another process of this worker does so, with a spare.
    `company`: the rules by which waiting jobs share the device of the job, as companions of the claim; None: none does.

    The plan and the lease are one transaction under the pool's advisory lock, so that no two workers see the same
    device free.
    """
    one_at_a_time(session, f"plan:{pool_name}")
    view = snapshot.snapshot(session, pool_name=pool_name).without(passed_over)
    made = snapshot.make_plan(view)
    sharing = {job.id: job.companions for job in view.running}
    for preemption in made.preemptions:
        for victim_id in (preemption.victim_id, *sharing[preemption.victim_id]):
            _request_preemption(session, victim_id, for_job_id=preemption.for_job_id, reason=preemption.reason)
    owners = _owners(session, pool_name)
    for assignment in made.assignments:
        parts = _by_worker(assignment.device_ids, owners)
        if worker_id in parts and assignment.device_ids[0] not in left:
            charged = view.charge(assignment.job_id)
            claim = _lease_training(
                session, assignment, parts, worker_id=worker_id, lease_seconds=lease_seconds, charged=charged
            )
            if claim is not None:
                if company is not None:
                    coming = _coming(session, view, made, assignment, company=company)
                    claim = _with_companions(session, claim, coming, view=view, lease_seconds=lease_seconds)
                snapshot.keep_first_etas(session, made)
                return claim
    snapshot.keep_first_etas(session, made)
    return None


def _owners(session: Session, pool_name: str) -> dict[str, tuple[str, str]]:
    """The worker and the host of each device."""
    rows = session.execute(select(DeviceRow.id, DeviceRow.worker_id, DeviceRow.host).where(DeviceRow.pool == pool_name))
    return {device_id: (worker_id, host) for device_id, worker_id, host in rows}


def _by_worker(device_ids: Sequence[str], owners: dict[str, tuple[str, str]]) -> dict[str, Member]:
    """Each worker's part of an assignment, the workers in their order. Nodes are numbered once a leader is known."""
    parts: dict[str, Member] = {}
    for device_id in sorted(device_ids, key=lambda device_id: (owners[device_id], device_ids.index(device_id))):
        worker_id, host = owners[device_id]
        known = parts[worker_id].device_ids if worker_id in parts else ()
        parts[worker_id] = Member(node=0, worker_id=worker_id, host=host, device_ids=(*known, device_id))
    return parts


def _request_preemption(session: Session, victim_id: str, *, for_job_id: str, reason: str) -> None:
    asked = session.execute(
        update(JobRow)
        .where(JobRow.id == victim_id, JobRow.status == "running", JobRow.preempt_requested_at.is_(None))
        .values(preempt_requested_at=func.now(), version=JobRow.version + 1)
        .returning(JobRow.id)
    ).one_or_none()
    if asked is not None:
        journal.append(
            session,
            victim_id,
            [
                NewEvent(
                    f"Preempted for job {for_job_id}: {reason}. It checkpoints and waits again.",
                    data={"preempted_for": for_job_id},
                )
            ],
        )
        _tell_beneficiary(session, for_job_id, victim_id=victim_id, reason=reason)


def _tell_beneficiary(session: Session, job_id: str, *, victim_id: str, reason: str) -> None:
    # The journal wants the row's lock. Whoever holds it now moves the job elsewhere: then nobody needs this event.
    row = select(JobRow.id).where(JobRow.id == job_id, JobRow.status == "queued").with_for_update(skip_locked=True)
    if session.scalars(row).one_or_none() is not None:
        event = NewEvent(f"Job {victim_id} makes room for this one: {reason}.", data={"preempts": victim_id})
        journal.append(session, job_id, [event])


def _lease_training(
    session: Session,
    assignment: Assignment,
    parts: dict[str, Member],
    *,
    worker_id: str,
    lease_seconds: float,
    charged: float,
) -> Claim | None:
    """Lease a job with all its devices to the worker, which leads where there are further parts; None: not any more."""
    job_id, own = assignment.job_id, parts[worker_id].device_ids
    others = (part for part in parts.values() if part.worker_id != worker_id)
    members = tuple(replace(part, node=node) for node, part in enumerate(others, start=1))
    device_ids = [*own, *(device_id for member in members for device_id in member.device_ids)]
    if not _lock_free(session, device_ids):
        return None
    taken = _take(session, assignment, worker_id=worker_id, lease_seconds=lease_seconds, charged=charged)
    if taken is None:
        return None
    session.execute(update(DeviceRow).where(DeviceRow.id.in_(device_ids)).values(leased_by=job_id, fence=taken.fence))
    snapshot.charge(session, taken.project_id, seconds=charged)
    _open_attempt(session, taken, worker_id=worker_id, device_ids=device_ids)
    claim = as_claim(session, taken, worker_id=worker_id, device_ids=own, members=members)
    gangs.call(session, claim.lease, members)
    return claim


def _coming(
    session: Session, view: snapshot.Snapshot, made: Plan, start: Assignment, *, company: Company
) -> tuple[str, ...]:
    return companions(
        made,
        start,
        queue=view.queue,
        devices=view.devices,
        shares=view.shares,
        grounds=snapshot.grounds(session, like=start.job_id),
        policy=view.policy,
        company=company,
    )


def _with_companions(
    session: Session, claim: Claim, job_ids: Sequence[str], *, view: snapshot.Snapshot, lease_seconds: float
) -> Claim:
    """The claim with those of the jobs that still wait: each gets a lease and an attempt over the same device."""
    worker_id, device_ids = claim.lease.worker_id, claim.device_ids
    joined: list[Claim] = []
    for job_id in job_ids:
        charged, start = view.charge(job_id), Assignment(job_id, device_ids)
        taken = _take(session, start, worker_id=worker_id, lease_seconds=lease_seconds, charged=charged)
        if taken is not None:
            snapshot.charge(session, taken.project_id, seconds=charged)
            _open_attempt(session, taken, worker_id=worker_id, device_ids=list(device_ids))
            joined.append(as_claim(session, taken, worker_id=worker_id, device_ids=device_ids))
    if not joined:
        return claim
    leases = [claim.lease, *(companion.lease for companion in joined)]
    shared_devices.tell_each(session, leases, device_id=device_ids[0])
    return replace(claim, companions=tuple(joined))


def _take(
    session: Session, assignment: Assignment, *, worker_id: str, lease_seconds: float, charged: float
) -> JobRow | None:
    return session.execute(
        update(JobRow)
        .where(JobRow.id == assignment.job_id, JobRow.status == "queued", JobRow.cancel_requested_at.is_(None))
        .values(
            status="running",
            fence=JobRow.fence + 1,
            attempts=JobRow.attempts + 1,
            lease_owner=worker_id,
            lease_until=ends_in(lease_seconds),
            started_at=func.coalesce(JobRow.started_at, func.now()),
            preempt_requested_at=None,
            pause_requested_at=None,
            charged_seconds=charged,
            backfill=assignment.backfill,
            version=JobRow.version + 1,
        )
        .returning(JobRow)
    ).scalar_one_or_none()


def _open_attempt(session: Session, job: JobRow, *, worker_id: str, device_ids: list[str]) -> None:
    session.add(
        AttemptRow(
            job_id=job.id,
            number=job.attempts,
            fence=job.fence,
            worker_id=worker_id,
            device_ids=device_ids,
            phase="leased",
            micro_batch_size=job.micro_batch_size,
        )
    )
    again = "" if job.attempts == 1 else f" again (attempt {job.attempts})"
    events = [NewEvent(f"Fine-tuning job started{again}", data={"attempt": job.attempts, "devices": device_ids})]
    warning = usage.soft_limit_warning(session, job.project_id)
    if warning is not None:
        events.append(NewEvent(warning, level="warn"))
    session.flush()
    journal.append(session, job.id, events)


def _lock_free(session: Session, device_ids: Sequence[str]) -> bool:
    """Hold the devices for this transaction; False unless all are there and free: a worker may have left meanwhile."""
    free = select(DeviceRow.id).where(DeviceRow.id.in_(device_ids), DeviceRow.leased_by.is_(None))
    return len(session.scalars(free.order_by(DeviceRow.id).with_for_update()).all()) == len(device_ids)


def claim_membership(session: Session, *, worker_id: str, passed_over: Collection[str] = ()) -> Membership | None:
    """Take this worker's part in an attempt that another one leads, or None when nobody calls. It is no lease.

    Raises WrittenByNewerVersion; the caller passes that job over too, and the leader misses it after a while.
    """
    row = gangs.take_call(session, worker_id, passed_over=passed_over)
    if row is None:
        return None
    job = session.get_one(JobRow, row.job_id, populate_existing=True)
    claim = as_claim(session, job, worker_id=worker_id, device_ids=tuple(row.device_ids))
    return Membership(claim, row.node)


def claim_validation(
    session: Session,
    *,
    worker_id: str,
    lease_seconds: float,
    passed_over: Collection[str] = (),
    lacking: Collection[str] = (),
) -> Claim | None:
    """Lease the oldest job whose files are checked and that nobody validates yet. Raises WrittenByNewerVersion.

    Rows are read with the base model. Jobs on one of `lacking`, base models that cannot come to this worker's host, are
    left to live workers whose hosts have it; where there is none, such a job is taken all the same.
    """
    left = [JobRow.base_model != name for name in sorted(_held_elsewhere(session, lacking, but=worker_id))]
    taken = leasing.take(
        session, SETTLING.kind, worker_id=worker_id, lease_seconds=lease_seconds, passed_over=passed_over, where=left
    )
    return None if taken is None else as_claim(session, taken, worker_id=worker_id)


def _held_elsewhere(session: Session, models: Collection[str], *, but: str) -> set[str]:
    """Which of `models` the hosts of other live workers have."""
    if not models:
        return set()
    able = (WorkerRow.last_seen > func.now() - SILENCE, WorkerRow.draining.is_(False), WorkerRow.id != but)
    devices = select(DeviceRow.cached_models).join(WorkerRow, WorkerRow.id == DeviceRow.worker_id)
    lists = session.scalars(devices.where(*able))
    return {name for names in lists for name in names}.intersection(models)


def as_claim(
    session: Session,
    job: JobRow,
    *,
    worker_id: str,
    device_ids: tuple[str, ...] = (),
    members: tuple[Member, ...] = (),
) -> Claim:
    """What the holder of a job's lease needs to know. Raises WrittenByNewerVersion."""
    try:
        request = CreateJob.model_validate(job.request)
        spec = None if job.spec is None else JobSpec.model_validate(job.spec)
    except ValidationError as error:
        raise WrittenByNewerVersion(job.id) from error
    return Claim(
        lease=Lease(kind="job", id=job.id, fence=job.fence, worker_id=worker_id, attempt=job.attempts),
        project_id=job.project_id,
        request=request,
        base_model=job.base_model,
        seed=job.seed,
        spec=spec,
        model_name=model_name(session, job),
        training_file=_file_ref(session, job.training_file),
        validation_file=None if job.validation_file is None else _file_ref(session, job.validation_file),
        device_ids=device_ids,
        micro_batch_size=job.micro_batch_size,
        pass_tokens=job.pass_tokens,
        gradient_checkpointing=job.gradient_checkpointing,
        last_checkpoint=job.last_checkpoint,
        members=members,
        parent=parents.of_job(session, job),
        parent_name=job.parent_name,
        traceparent=job.traceparent,
        created_at=job.created_at,
        queued_at=job.queued_at,
    )


def _file_ref(session: Session, file_id: str) -> FileRef:
    return FileRef.of(session.get_one(FileRow, file_id))
