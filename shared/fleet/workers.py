"""Registers workers and their devices, takes their heartbeats, and drops those that went away."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, case, delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from shared.fleet import members
from shared.lease import lease
from shared.plan.fairshare import Policy
from shared.store.tables import DeviceRow, Leased, WorkerRow

# A worker reports itself every ten seconds, and two reports fit into this (`Settings.heartbeat_seconds`). After this
# silence its devices leave the plan, and another worker of the same host may take them over.
SILENCE: Final = timedelta(seconds=60)
FORGOTTEN = timedelta(days=1)
GONE = "it no longer answers; see the kernel log of its host"


@dataclass(frozen=True, slots=True)
class NewWorker:
    """A worker as it introduces itself. The id stands for a host and a home, so a restart is the same worker."""

    id: str
    host: str
    pool: str
    boot_id: str
    version: str
    isolation: dict[str, Any] | None = None  # what its host keeps programs from (shared/operating/isolation.py)
    trackers: list[str] | None = None  # those that it has the libraries for
    libraries: dict[str, str] | None = None  # name -> version, of what its trainers run on


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """A device as its host shows it; `id` is `{host}:{uuid}`, sizes in bytes."""

    id: str
    kind: str
    name: str
    total_bytes: int
    free_bytes: int
    foreign_bytes: int
    healthy: bool
    bfloat16: bool
    cached_models: list[str]
    ailment: str | None = None  # why it is not healthy
    capability: int | None = None  # NVIDIA's compute capability: 80 is 8.0
    probed: str | None = None  # what the trainer's own program found there
    readings: dict[str, float] | None = None  # of a GPU: utilization (of 1), watts, celsius
    warm_base: str | None = None  # the base model that waits in memory for its next job
    host: str | None = None  # where that is not its worker's: a place in a cluster


@dataclass(frozen=True, slots=True)
class WorkerOrders:
    """The answer to a worker's report."""

    draining: bool
    device_ids: tuple[str, ...]


def register(
    session: Session, worker: NewWorker, devices: Sequence[DeviceReport], *, leased: Iterable[type[Leased]]
) -> None:
    """Announce a worker that has just started and holds nothing: leases it had before are over.

    `leased`: the tables whose rows it may hold.

    The caller must have proven that every process of the earlier worker with this id is dead.
    """
    columns = asdict(worker)
    session.execute(
        insert(WorkerRow)
        .values(**columns, draining=False)
        # A worker that an administrator drained stays drained over its restarts: that is what draining is for.
        .on_conflict_do_update(
            index_elements=[WorkerRow.id],
            set_={**columns, "started_at": func.now(), "last_seen": func.now()},
        )
    )
    lease.give_up(session, leased, worker.id)
    members.end_parts_of_restarted(session, worker.id)
    _put_devices(session, worker, devices)
    session.execute(delete(DeviceRow).where(_gone(worker.id, devices), DeviceRow.leased_by.is_(None)))


def report(session: Session, worker: NewWorker, devices: Sequence[DeviceReport]) -> WorkerOrders | None:
    """Say "still here, and this is free". None: the worker was forgotten and must register again."""
    draining = session.execute(
        update(WorkerRow)
        .where(WorkerRow.id == worker.id, WorkerRow.boot_id == worker.boot_id)
        .values(last_seen=func.now())
        .returning(WorkerRow.draining)
    ).scalar_one_or_none()
    if draining is None:
        return None
    _put_devices(session, worker, devices)
    # A device that was there and no longer answers is broken, not gone: somebody must look at it.
    session.execute(
        update(DeviceRow).where(_gone(worker.id, devices), DeviceRow.healthy).values(healthy=False, ailment=GONE)
    )
    mine = session.scalars(select(DeviceRow.id).where(DeviceRow.worker_id == worker.id)).all()
    return WorkerOrders(draining=draining, device_ids=tuple(mine))


def _gone(worker_id: str, devices: Sequence[DeviceReport]) -> ColumnElement[bool]:
    return (DeviceRow.worker_id == worker_id) & DeviceRow.id.not_in([device.id for device in devices])


def _put_devices(session: Session, worker: NewWorker, devices: Sequence[DeviceReport]) -> None:
    """Write the devices that are this worker's: new ones, its own, and those of a worker that fell silent."""
    for device in devices:
        columns = {**asdict(device), "worker_id": worker.id, "host": device.host or worker.host, "pool": worker.pool}
        silent = select(WorkerRow.id).where(WorkerRow.last_seen < func.now() - SILENCE)
        session.execute(
            insert(DeviceRow)
            .values(**columns)
            .on_conflict_do_update(
                index_elements=[DeviceRow.id],
                set_=columns,
                where=or_(DeviceRow.worker_id == worker.id, DeviceRow.worker_id.in_(silent)),
            )
        )


def set_draining(session: Session, worker_id: str, *, draining: bool) -> bool:
    """Have a worker take no more work, or take it again. False: no such worker."""
    updated = session.execute(
        update(WorkerRow).where(WorkerRow.id == worker_id).values(draining=draining).returning(WorkerRow.id)
    )
    return updated.one_or_none() is not None


def set_quarantined(session: Session, device_id: str, *, quarantined: bool) -> bool:
    """Take a device out of the plan, or put it back. False: no such device."""
    updated = session.execute(
        update(DeviceRow).where(DeviceRow.id == device_id).values(quarantined=quarantined).returning(DeviceRow.id)
    )
    return updated.one_or_none() is not None


def retire(session: Session, worker_id: str) -> None:
    """Remove a worker that has stopped, with its free devices; leased ones wait for the reaper."""
    session.execute(delete(DeviceRow).where(DeviceRow.worker_id == worker_id, DeviceRow.leased_by.is_(None)))
    session.execute(update(WorkerRow).where(WorkerRow.id == worker_id).values(last_seen=func.to_timestamp(0)))
    members.retire(session, worker_id)


def forget(session: Session) -> list[str]:
    """Drop workers silent for a day, and their devices; a leased device keeps its worker until the lease is over."""
    old = select(WorkerRow.id).where(WorkerRow.last_seen < func.now() - FORGOTTEN)
    session.execute(delete(DeviceRow).where(DeviceRow.worker_id.in_(old), DeviceRow.leased_by.is_(None)))
    kept = select(DeviceRow.worker_id)
    gone = session.scalars(
        delete(WorkerRow)
        .where(WorkerRow.last_seen < func.now() - FORGOTTEN, WorkerRow.id.not_in(kept))
        .returning(WorkerRow.id)
    )
    return list(gone)


def leased_devices(session: Session, worker_id: str) -> list[str]:
    """Ids of the worker's devices that a job has now."""
    leased = select(DeviceRow.id).where(DeviceRow.worker_id == worker_id, DeviceRow.leased_by.is_not(None))
    return list(session.scalars(leased))


def has_idle_device(session: Session, worker_id: str) -> bool:
    """Whether a healthy device of this worker waits for work."""
    idle = select(DeviceRow.id).where(
        DeviceRow.worker_id == worker_id,
        DeviceRow.healthy,
        DeviceRow.quarantined.is_(False),
        DeviceRow.leased_by.is_(None),
    )
    return session.scalars(idle.limit(1)).one_or_none() is not None


def _offered() -> ColumnElement[int]:
    """Bytes that a device has when no job is there, as `device_fit.offered` computes them."""
    leaving = case((DeviceRow.foreign_bytes > Policy().foreign_tolerance_bytes, DeviceRow.foreign_bytes), else_=0)
    gpu = func.least(DeviceRow.total_bytes, DeviceRow.free_bytes + leaving)
    return case((DeviceRow.kind == "cpu", DeviceRow.total_bytes - DeviceRow.foreign_bytes), else_=gpu)


def roomiest_device(session: Session, *, pool_name: str) -> DeviceReport | None:
    """The device to settle jobs for: the GPU that offers the most when idle, and a CPU only where there is no GPU.

    None: no worker has a device that may be used.
    """
    row = session.scalars(
        select(DeviceRow)
        .where(DeviceRow.pool == pool_name, DeviceRow.healthy, DeviceRow.quarantined.is_(False))
        .order_by((DeviceRow.kind == "cpu").asc(), _offered().desc(), DeviceRow.total_bytes.desc(), DeviceRow.id)
        .limit(1)
    ).one_or_none()
    if row is None:
        return None
    return DeviceReport(
        id=row.id,
        kind=row.kind,
        name=row.name,
        total_bytes=row.total_bytes,
        free_bytes=row.free_bytes,
        foreign_bytes=row.foreign_bytes,
        healthy=row.healthy,
        bfloat16=row.bfloat16,
        cached_models=row.cached_models,
        ailment=row.ailment,
        capability=row.capability,
        probed=row.probed,
    )
