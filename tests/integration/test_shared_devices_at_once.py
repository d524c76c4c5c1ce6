"""Two jobs of a group that end in the same moment: the device is free afterwards."""

from __future__ import annotations

import threading

from sqlalchemy import Engine, select, text, update

from shared.jobs import moves
from shared.lease.values import Lease
from shared.plan.companions import Company
from shared.store.db import session_scope
from shared.store.tables import DeviceRow, JobRow
from tests.factories import make_caller, make_queued_job, make_worker
from tests.lifecycle.stack import until


def test_of_two_that_end_at_once_the_second_frees_the_device(engine: Engine) -> None:
    with session_scope(engine) as session:
        caller = make_caller(session)
        for _ in range(2):
            make_queued_job(session, caller)
        session.execute(update(JobRow).values(cotraining_ground="tiny", base_bytes=1, expected_seconds=60.0))
        worker = make_worker(session)
        company = Company(most=2, longest_seconds=600)
        leading = moves.claim_training(
            session, worker_id=worker.id, pool_name=worker.pool, lease_seconds=60, company=company
        )
        assert leading is not None
        (companion,) = leading.companions

    def end(lease: Lease) -> None:
        with session_scope(engine) as session:
            assert moves.fail(session, lease, code="c", message="m")

    later = threading.Thread(target=end, args=(companion.lease,))
    with session_scope(engine) as session:
        assert moves.fail(session, leading.lease, code="c", message="m")
        # It has named the other job, whose end is under way and waits for the device.
        assert session.scalars(select(DeviceRow.leased_by)).one() == companion.lease.id
        later.start()
        until(lambda: _waits_for_a_lock(engine), what="the second end at the device's lock")
    later.join()

    with session_scope(engine) as session:
        assert session.execute(select(DeviceRow.leased_by, DeviceRow.fence)).one() == (None, None)
        assert set(session.scalars(select(JobRow.status))) == {"failed"}


def _waits_for_a_lock(engine: Engine) -> bool:
    with session_scope(engine) as session:
        waiting = text("select count(*) from pg_stat_activity where wait_event_type = 'Lock'")
        return bool(session.execute(waiting).scalar_one())
