"""What the plan reads of a waiting job is what its row says, column by column."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import update
from sqlalchemy.orm import Session

from shared.fleet import snapshot
from shared.plan.fairshare import QueuedJob
from shared.store.tables import JobRow
from tests.factories import make_caller, make_queued_job


def test_each_field_of_a_waiting_job_is_read_from_its_own_column(session: Session) -> None:
    """No two columns of one type have one value here, so that none can stand in for another."""
    caller = make_caller(session)
    job_id = make_queued_job(session, caller).id
    columns = {
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        "not_before": datetime(2026, 1, 2, tzinfo=UTC),
        "tier": "interactive",
        "priority": 3,
        "gpus": 4,
        "nodes": 5,
        "bytes_per_device": 6,
        "needs_capability": 80,
        "max_runtime_seconds": 7.0,
        "expected_seconds": 8.0,
        "progress": {},
        "base_model": "a base",
    }
    of_flags = dict.fromkeys(("preemptible", "held", "needs_gpu", "needs_bfloat16"), False)

    for flag in of_flags:
        session.execute(update(JobRow).where(JobRow.id == job_id).values({**columns, **of_flags, flag: True}))
        (read,) = (job for job in snapshot.snapshot(session, pool_name="default").queue if job.id == job_id)

        assert read == QueuedJob(
            id=job_id,
            project=caller.project_id,
            key=caller.key_id,
            submitted_at=datetime(2026, 1, 1, tzinfo=UTC),
            not_before=datetime(2026, 1, 2, tzinfo=UTC),
            tier="interactive",
            priority=3,
            gpus=4,
            nodes=5,
            bytes_per_device=6,
            needs_capability=80,
            max_runtime_seconds=7.0,
            expected_seconds=8.0,
            base_model="a base",
            **{**of_flags, flag: True},
        )
