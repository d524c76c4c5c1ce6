"""Jobs whose settled values fit no device any more are settled once more, for what the pool offers now.

Open values are chosen for one device and one amount of memory. When that device leaves for good, or a driver and a
desktop take more of it than before, a job could wait for ever although other values would do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from shared.contract.passes import device_kind
from shared.fleet import snapshot, workers
from shared.lease import journal
from shared.lease.journal import NewEvent
from shared.plan.capacity import Abilities, Demand, Device, HostMap
from shared.settle import device_fit
from shared.settle.settling import RESERVE, DeviceFacts
from shared.settle.sizing import GIB
from shared.store.tables import JobRow, WorkerRow

# Jobs looked at by one pass: the next one takes the rest.
JOBS_PER_PASS: Final = 1000


def pool_offer(session: Session, pool_name: str) -> DeviceFacts | None:
    """What the pool offers a job at best, when no job is there; None: no worker has a device that may be used."""
    best = workers.roomiest_device(session, pool_name=pool_name)
    if best is None:
        return None
    kind = device_kind(best.kind)
    free = device_fit.offered(kind, total=best.total_bytes, free=best.free_bytes, foreign=best.foreign_bytes)
    return DeviceFacts(kind=kind, total_bytes=best.total_bytes, free_bytes=free, bfloat16=best.bfloat16)


def noted(offer: DeviceFacts) -> dict[str, Any]:
    """The device that a job was settled for, as its row keeps it."""
    return {
        "kind": offer.kind,
        "total_bytes": offer.total_bytes,
        "free_bytes": offer.free_bytes,
        "bfloat16": offer.bfloat16,
    }


def settle_anew(session: Session) -> list[str]:
    """queued -> validating_files, for jobs that fit nowhere and would be settled for another device now.

    Only jobs without a checkpoint: what has been trained was trained with the values as they are. A device that is
    ailing or silent for the moment still counts, and so does one that strangers use: none of these lasts.

    Returns the jobs' ids.
    """
    pools = list(session.scalars(select(WorkerRow.pool).distinct()))
    offers = [offer for pool in pools if (offer := pool_offer(session, pool)) is not None and offer.total_bytes]
    if not offers:
        return []
    maps = [HostMap(_rooms(session, pool)) for pool in pools]
    waiting = select(JobRow).where(JobRow.status == "queued", JobRow.last_checkpoint.is_(None), JobRow.held.is_(False))
    rows = session.scalars(waiting.order_by(JobRow.id).limit(JOBS_PER_PASS)).all()
    unfit = [job for job in rows if _is_unfit(job, maps)]
    return [job.id for job in unfit if not _settled_for_one_of(offers, job.settled_for) and _move(session, job, offers)]


def _is_unfit(job: JobRow, maps: list[HostMap]) -> bool:
    """Whether a pool has as many devices as the job asks for, and none has them as it was settled."""
    demand = _demand(job)
    shape = Demand(job.gpus, job.nodes, 0)
    return any(room.fits(shape) for room in maps) and not any(room.fits(demand) for room in maps)


def _rooms(session: Session, pool_name: str) -> Iterator[tuple[Device, int]]:
    for device in snapshot.devices(session, pool_name, silent=True):
        kind = device_kind(device.kind)
        yield (
            device,
            device_fit.offered(kind, total=device.total_bytes, free=device.free_bytes, foreign=device.foreign_bytes),
        )


def _demand(job: JobRow) -> Demand:
    several = job.gpus * job.nodes > 1
    needs = Abilities(job.needs_gpu, job.needs_bfloat16, job.needs_capability or 0, several, meets=job.nodes > 1)
    return Demand(job.gpus, job.nodes, job.bytes_per_device, needs)


def _settled_for_one_of(offers: list[DeviceFacts], before: dict[str, Any] | None) -> bool:
    """Whether another settling would see what the last one saw. Memory that moves within the reserve is the same."""
    return before is not None and any(
        (before["kind"], before["bfloat16"]) == (offer.kind, offer.bfloat16)
        and abs(before["free_bytes"] - offer.free_bytes) <= RESERVE * offer.total_bytes
        for offer in offers
    )


def _move(session: Session, job: JobRow, offers: list[DeviceFacts]) -> bool:
    """Whether the job still waited as it was read. The lower rungs that running out of memory has found are let go."""
    moved = session.execute(
        update(JobRow)
        .where(JobRow.id == job.id, JobRow.status == "queued", JobRow.fence == job.fence)
        .values(
            status="validating_files",
            # Noted here too: a worker of an earlier version settles it without a note.
            settled_for=noted(offers[0]),
            micro_batch_size=None,
            pass_tokens=None,
            gradient_checkpointing=None,
            not_before=None,
            version=JobRow.version + 1,
        )
        .returning(JobRow.id)
    ).one_or_none()
    if moved is not None:
        needed = job.bytes_per_device / GIB
        words = (
            f"No device of the pool has what this job was settled for ({needed:.1f} GiB on each device); its open "
            "values are settled anew"
        )
        journal.append(session, job.id, [NewEvent(words, level="warn")])
    return moved is not None
