"""How a chore with a status of its own fails: at once, or after the last of its tries."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func
from sqlalchemy.orm import Session

from shared.contract.documents import error_document
from shared.lease import lease as leasing
from shared.lease.lease import Kind
from shared.lease.values import Lease


def failed(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """The columns of a row that has failed."""
    error = error_document(code, message, param=param)
    return {"status": "failed", "error": error, "finished_at": func.now()}


def fail(session: Session, kind: Kind, lease: Lease, *, code: str, message: str, param: str | None = None) -> bool:
    """running -> failed: trying again would not help. False: the lease is lost."""
    return leasing.end(session, kind, lease, **failed(code, message, param))


def give_back(session: Session, kind: Kind, lease: Lease, *, seconds: float, code: str, message: str) -> bool:
    """running -> queued after something that may pass; failed with it after the last try. False: the lease is lost."""
    last = failed(code, message)
    return leasing.postpone(session, kind, lease, seconds=seconds, counted=True, last=last, error=last["error"])
