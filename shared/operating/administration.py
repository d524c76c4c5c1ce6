"""Acts of administrators while the pool runs: on its rules, workers, devices and keys. Each act is audited."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from shared.errors import Forbidden, Invalid, NotFound
from shared.fleet import workers
from shared.store.tables import ApiKeyRow, DeviceRow, PoolRow, WorkerRow
from shared.tenants import audit, keys, projects, rotation
from shared.tenants.keys import Caller

# --- the pool, its workers and devices --------------------------------------------------------------------------------


def edit_pool(session: Session, caller: Caller, pool_name: str, changes: dict[str, Any], *, action: str) -> PoolRow:
    """Hold or release a pool, or change its policy; the next plan follows. None stands for the default."""
    session.execute(insert(PoolRow).values(name=pool_name).on_conflict_do_nothing())
    row = session.scalars(select(PoolRow).where(PoolRow.name == pool_name).with_for_update()).one()
    before = {name: getattr(row, name) for name in changes}
    for name, value in changes.items():
        setattr(row, name, value)
    session.flush()
    audit.record(session, caller, action, pool_name, before=before, after=changes)
    return row


def set_draining(session: Session, caller: Caller, worker_id: str, *, draining: bool) -> WorkerRow:
    """Have a worker checkpoint, give back and take nothing more, or take work again. Raises NotFound."""
    row = session.get(WorkerRow, worker_id, with_for_update=True)
    if row is None:
        raise NotFound(f"No worker '{worker_id[:100]}'. GET /v1/tunepool/workers lists them.", param="worker_id")
    before = row.draining
    workers.set_draining(session, worker_id, draining=draining)
    action = "worker.drain" if draining else "worker.undrain"
    audit.record(session, caller, action, worker_id, before={"draining": before}, after={"draining": draining})
    session.refresh(row)
    return row


def set_quarantined(
    session: Session, caller: Caller, device_id: str, *, quarantined: bool, reason: str | None = None
) -> DeviceRow:
    """Give a device to no job, or to jobs again; a job that runs there goes on. Raises NotFound."""
    row = session.get(DeviceRow, device_id, with_for_update=True)
    if row is None:
        raise NotFound(f"No device '{device_id[:100]}'. GET /v1/tunepool/pool lists them.", param="device_id")
    before = row.quarantined
    workers.set_quarantined(session, device_id, quarantined=quarantined)
    action = "device.quarantine" if quarantined else "device.release"
    after = {"quarantined": quarantined, **({"reason": reason} if reason else {})}
    audit.record(session, caller, action, device_id, before={"quarantined": before}, after=after)
    session.refresh(row)
    return row


def all_workers(session: Session) -> Sequence[WorkerRow]:
    return session.scalars(select(WorkerRow).order_by(WorkerRow.host, WorkerRow.id)).all()


# --- keys -------------------------------------------------------------------------------------------------------------


def create_key(session: Session, caller: Caller, *, project_id: str, **values: Any) -> tuple[ApiKeyRow, str]:
    """A key of any project, and its secret. Raises NotFound, Forbidden for a scope that is not the caller's to give."""
    projects.find(session, project_id)
    _refuse_unknown(values["scopes"])
    _refuse_past_end(session, values)
    row, secret = keys.create(session, project_id=project_id, **values)
    session.refresh(row)
    audit.record(session, caller, "key.create", row.id, after=limits_of(row) | {"project_id": project_id})
    return row, secret


def edit_key(session: Session, caller: Caller, key_id: str, changes: dict[str, Any]) -> ApiKeyRow:
    """Change a key's name, scopes, caps and bounds; its next request follows. Raises NotFound, Invalid, Forbidden."""
    row = keys.find(session, key_id)
    before = limits_of(row)
    _refuse_past_end(session, changes)
    if "scopes" in changes:
        _refuse_unknown(changes["scopes"])
        if row.id == caller.key_id and keys.ADMIN not in changes["scopes"]:
            raise Forbidden("A key cannot take 'admin' from itself; use another one.", param="scopes")
        if row.prefix == keys.EXCHANGED and keys.ADMIN in changes["scopes"]:
            raise Forbidden("Keys of rules for ID tokens never operate the pool; leave 'admin' out.", param="scopes")
    for name, value in changes.items():
        setattr(row, name, value)
    session.flush()
    audit.record(session, caller, "key.edit", row.id, before=before, after=limits_of(row))
    return row


def revoke_key(session: Session, caller: Caller, key_id: str) -> ApiKeyRow:
    """End a key at once. Raises NotFound, Forbidden for the caller's own."""
    if key_id == caller.key_id:
        raise Forbidden("A key cannot revoke itself; use another one.", param="key_id")
    keys.revoke(session, key_id)
    row = keys.find(session, key_id)
    audit.record(session, caller, "key.revoke", key_id, after={"revoked": True})
    return row


def rotate_key(session: Session, caller: Caller, key_id: str, *, overlap: timedelta) -> tuple[ApiKeyRow, str]:
    """A key's new secret; the one until now stays valid for `overlap`. Raises NotFound, Conflict."""
    row, secret = rotation.rotate(session, key_id, overlap=overlap)
    former = {"former_valid_seconds": int(overlap.total_seconds()), "prefix": row.prefix}
    audit.record(session, caller, "key.rotate", key_id, after=former)
    return row, secret


def limits_of(row: ApiKeyRow) -> dict[str, Any]:
    """The settings of a key, for the audit; no trace of its secret."""
    names = ("name", "scopes", "max_running", "max_queued", "max_tier", "max_priority")
    expires = None if row.expires_at is None else row.expires_at.isoformat()
    return {name: getattr(row, name) for name in names} | {"expires_at": expires}


def _refuse_unknown(scopes: Sequence[str]) -> None:
    unknown = sorted(set(scopes) - keys.SCOPES)
    if unknown:
        known = ", ".join(sorted(keys.SCOPES))
        raise Invalid(f"Unknown scope '{unknown[0][:100]}'. Known: {known}.", param="scopes")


def _refuse_past_end(session: Session, changes: dict[str, Any]) -> None:
    """A moment that has passed would end a key at once, and an administrator's own without a way back."""
    end = changes.get("expires_at")
    if end is not None and end <= session.scalar(select(func.now())):
        raise Invalid(
            f"expires_at {int(end.timestamp())} has passed; give a later moment, or revoke the key to end it now.",
            param="expires_at",
        )
