"""The CPU lane's longer work: exports, made as merges are (`merging.py`), and pushes (`pushing.py`)."""

from __future__ import annotations

from functools import partial

import structlog

from shared.chores import exports
from shared.chores.exports import EXPORT, PushClaim
from shared.chores.merges import MergeClaim
from worker.chores import merging
from worker.chores.pushing import push
from worker.chores.run_program import under_lease
from worker.host.host import Host

log = structlog.get_logger()


def export_next(host: Host) -> bool:
    """Make one export, if any waits and long work may begin. False: none does."""
    claim = host.claim(
        partial(
            exports.claim,
            worker_id=host.worker.id,
            lease_seconds=host.settings.lease_seconds,
            turn=host.turn("export"),
        )
    )
    if claim is None:
        return False
    assert isinstance(claim, MergeClaim | PushClaim), claim  # a union of two is an object to the type of `claim`
    host.served["export"] = claim.project_id
    if isinstance(claim, PushClaim):
        return under_lease(host, EXPORT, claim.lease, partial(push, host, claim))
    log.info("export.claimed", export_id=claim.lease.id, attempt=claim.lease.attempt)
    return under_lease(host, EXPORT, claim.lease, partial(merging.make, exports.RECORDS, host, claim))
