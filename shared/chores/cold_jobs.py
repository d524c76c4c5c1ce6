"""Jobs whose base model is on no host that fits: who fetches it for them, what they hear of it, and when they end.

The plan starts a job only where its base model is (shared/plan/capacity.py), so no device waits for a download.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from shared.chores import fetches
from shared.chores.fetches import Fetch
from shared.fleet import snapshot
from shared.fleet.workers import SILENCE
from shared.jobs import moves
from shared.lease import journal
from shared.lease.journal import NewEvent
from shared.plan.capacity import Abilities, Device
from shared.store.tables import DeviceRow, FetchRow, JobRow, WorkerRow

_ALIVE: Final = WorkerRow.last_seen > func.now() - SILENCE
_REVISION: Final = JobRow.spec["base_model"]["revision"].as_string()


class _Want(NamedTuple):
    """What some waiting jobs ask for; `smallest` is the one that asks for the least memory."""

    base_model: str
    revision: str
    gpus: int
    nodes: int
    needs_gpu: bool
    needs_bfloat16: bool
    needs_capability: int | None
    smallest: int  # bytes per device

    def takes(self, host: Sequence[Device]) -> bool:
        """Whether such a job may run on the host, once its base model is there."""
        whole = self.gpus * self.nodes > 1
        needs = Abilities(self.needs_gpu, self.needs_bfloat16, self.needs_capability or 0, whole)
        able = [device for device in host if device.usable and needs.met_by(device)]
        return sum(device.total_bytes >= self.smallest for device in able) >= self.gpus


def call(session: Session) -> int:
    """Have every host fetch the base models of waiting jobs that it could take. Returns how many were asked.

    A host that could not have one is asked again after a while.
    """
    hosts = _hosts(session)
    return sum(
        fetches.put(session, worker_id, want.base_model, want.revision)
        for want in _wants(session, JobRow.held.is_(False))
        for worker_id in _cold(want, hosts)
    )


def call_for(session: Session, job_id: str) -> int:
    """The same for a job that has just been queued, if its base model is on no fitting host. Its events say so.

    A host that was refused the model before asks once more: its terms may have been accepted.
    """
    hosts, asked = _hosts(session), 0
    for want in _wants(session, JobRow.id == job_id):
        cold = _cold(want, hosts)
        warm = sum(want.takes(devices) for devices in hosts.values()) - len(cold)
        if cold and warm < want.nodes:
            asked = sum(
                fetches.put(session, worker_id, want.base_model, want.revision, at_once=True) for worker_id in cold
            )
            fetching = "1 host fetches" if len(cold) == 1 else f"{len(cold)} hosts fetch"
            words = (
                f"The base model '{want.base_model}' is on no host that fits this job; {fetching} it. The job takes a "
                "device once it is there."
            )
            journal.append(session, job_id, [NewEvent(words, data={"base_model": want.base_model})])
    return asked


def _hosts(session: Session) -> dict[str, list[Device]]:
    """The devices of each live worker, by its id."""
    hosts: dict[str, list[Device]] = {}
    for pool_name in session.scalars(select(WorkerRow.pool).where(_ALIVE).distinct()):
        for device in snapshot.devices(session, pool_name):
            hosts.setdefault(device.host, []).append(device)
    return hosts


def _wants(session: Session, which: ColumnElement[bool]) -> list[_Want]:
    asked = (
        JobRow.base_model,
        _REVISION,
        JobRow.gpus,
        JobRow.nodes,
        JobRow.needs_gpu,
        JobRow.needs_bfloat16,
        JobRow.needs_capability,
    )
    rows = session.execute(
        select(*asked, func.min(JobRow.bytes_per_device)).where(JobRow.status == "queued", which).group_by(*asked)
    )
    return [_Want(*row) for row in rows]


def _cold(want: _Want, hosts: dict[str, list[Device]]) -> list[str]:
    """The workers whose host lacks only the jobs' base model to take them."""
    return [
        worker_id
        for worker_id, devices in sorted(hosts.items())
        if want.takes(devices) and not any(want.base_model in device.cached_models for device in devices)
    ]


def arrived(session: Session, fetch: Fetch, *, size: int) -> bool:
    """The worker's host has the model, of `size` bytes: jobs may start there now. False: the lease is lost."""
    if not fetches.finish(session, fetch.lease, size=size):
        return False
    first = not _holders(session, fetch.model, but=fetch.lease.worker_id)  # its own report may have come before
    own = select(DeviceRow).where(DeviceRow.worker_id == fetch.lease.worker_id).order_by(DeviceRow.id)
    host = ""
    for device in session.scalars(own.with_for_update()):  # its next report says the same
        device.cached_models, host = sorted({*device.cached_models, fetch.model}), device.host
    if first and host:
        words = f"The host '{host}' has the base model '{fetch.model}' now ({size:,} bytes)"
        _tell(session, fetch, NewEvent(words, data={"base_model": fetch.model, "bytes": size}))
    return True


def refuse(session: Session, fetch: Fetch, *, code: str, error: str) -> bool:
    """The worker cannot have the model, and only people can mend that. False: the lease is lost.

    Jobs that wait for it end with the reason, unless another host has it or may still bring it.
    """
    if not fetches.fail(session, fetch.lease, error=error, code=code):
        return False
    refused = session.get_one(FetchRow, fetch.lease.id, populate_existing=True)
    alike = (FetchRow.model == refused.model, FetchRow.revision == refused.revision)
    hopes = (
        select(FetchRow.id)
        .join(WorkerRow, WorkerRow.id == FetchRow.worker_id)
        .where(*alike, _ALIVE, FetchRow.code.is_(None))
        .limit(1)
    )
    if not _holders(session, fetch.model) and session.scalar(hopes) is None:
        which = (JobRow.base_model == refused.model, refused.revision == _REVISION)
        moves.fail_waiting(session, *which, code=code, message=error, param="model")
    return True


def put_off(session: Session, fetch: Fetch, *, error: str) -> bool:
    """Its source was away, or there was no room: once more in a while. Jobs hear of the last try.

    False: the lease is lost.
    """
    if not fetches.try_again(session, fetch.lease, error=error):
        return False
    row = session.get_one(FetchRow, fetch.lease.id, populate_existing=True)
    if row.state == "error" and not _holders(session, fetch.model):
        words = f"The base model '{fetch.model}' could not be fetched: {error} The job waits; it is tried again."
        _tell(session, fetch, NewEvent(words, level="warn", data={"base_model": fetch.model}))
    return True


def _holders(session: Session, model: str, *, but: str = "") -> bool:
    """Whether the host of a live worker has the model; `but`: a worker that does not count."""
    lists = session.scalars(
        select(DeviceRow.cached_models)
        .join(WorkerRow, WorkerRow.id == DeviceRow.worker_id)
        .where(_ALIVE, WorkerRow.id != but)
    )
    return any(model in names for names in lists)


def _tell(session: Session, fetch: Fetch, event: NewEvent) -> None:
    """Say it to the jobs that wait for the model. Whoever holds such a row moves the job: it needs no event."""
    rows = select(JobRow.id).where(JobRow.status == "queued", JobRow.base_model == fetch.model)
    waiting = session.scalars(rows.order_by(JobRow.id).with_for_update(skip_locked=True)).all()
    journal.append_to_each(session, waiting, event)
