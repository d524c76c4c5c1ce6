"""The moves of a job, against a real Postgres."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from psycopg._queries import MAX_CACHED_STATEMENT_LENGTH, MAX_CACHED_STATEMENT_PARAMS
from sqlalchemy import event, func, inspect, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from shared.errors import Conflict, Invalid, LimitReached
from shared.jobs import moves, operations, pages, submission
from shared.jobs.operations import Selection
from shared.lease.journal import NewEvent
from shared.lease.values import Claim, NewFile
from shared.products import files
from shared.settings import Settings
from shared.settle.catalogue import SMOLLM2
from shared.store.tables import AdapterRow, AttemptRow, DeviceRow, EventRow, FileRow, JobRow, ProjectRow
from tests.factories import claim_on, make_caller, make_file, make_job, make_queued_job, make_request, make_worker

MANIFEST = {"prefix": "p", "files": []}


def started(session: Session) -> tuple[JobRow, Claim]:
    job = make_queued_job(session, make_caller(session))
    claim = claim_on(session, make_worker(session))
    assert claim is not None
    session.refresh(job)
    return job, claim


def test_a_lease_is_whole_however_long_its_claim_waited_for_a_lock(session: Session) -> None:
    make_queued_job(session, make_caller(session))
    worker = make_worker(session)
    now = session.scalars(select(func.clock_timestamp())).one()  # this transaction began earlier

    claim = claim_on(session, worker)

    assert claim is not None
    assert session.get_one(JobRow, claim.lease.id).lease_until >= now + timedelta(seconds=60)


def test_a_submitted_job_waits_for_its_files_and_says_so(session: Session) -> None:
    job = make_job(session, make_caller(session))

    messages = session.scalars(select(EventRow.message).where(EventRow.job_id == job.id).order_by(EventRow.seq)).all()

    assert job.status == "validating_files"
    assert messages == [f"Created fine-tuning job: {job.id}", "Validating training file: train.jsonl"]


def test_an_accepted_job_is_told_as_the_database_has_it(session: Session) -> None:
    job = make_job(session, make_caller(session), metadata={"sha": "1"}, tunepool={"queue": {"priority": 3}})

    told = {name: getattr(job, name) for name in inspect(JobRow).columns.keys()}  # noqa: SIM118  # no mapping
    session.expire(job)
    stored = {name: getattr(job, name) for name in told}

    assert told == stored


def test_accepting_a_job_takes_two_statements_that_the_driver_keeps(session: Session) -> None:
    caller = make_caller(session)
    request = make_request(make_file(session, caller).id)
    said: list[tuple[str, dict[str, object]]] = []
    event.listen(session.connection(), "before_cursor_execute", lambda *call: said.append((call[2], call[3])))

    submission.submit(session, request, caller=caller, base=SMOLLM2.ref, request_sha256="a")

    assert [statement.split()[0].lower() for statement, _ in said] == ["select", "with"]
    for statement, values in said:
        assert len(statement) <= MAX_CACHED_STATEMENT_LENGTH
        assert len(values) <= MAX_CACHED_STATEMENT_PARAMS


def test_what_has_not_ended_is_found_by_its_index_however_many_jobs_have(session: Session) -> None:
    caller = make_caller(session, max_queued=10)
    file = make_file(session, caller)
    request = make_request(file.id)
    session.execute(text("set local enable_seqscan = off"))  # a table of a test is too small for the choice to be made
    said: list[tuple[str, Any]] = []
    event.listen(session.connection(), "before_cursor_execute", lambda *call: said.append((call[2], call[3])))
    other = make_file(session, caller).id

    pages.unfinished(session)
    files.delete(session, other, project_id=caller.project_id)
    submission.submit(session, request, caller=caller, base=SMOLLM2.ref, request_sha256="a")
    selection = Selection(statuses=("queued", "validating_files"))
    operations.cancel_all(session, caller, selection, pool_name="default")

    looks = [
        (statement, values)
        for statement, values in said
        if statement.startswith("SELECT") and "jobs.status IN" in statement
    ]
    plans = [
        "".join(session.connection().exec_driver_sql(f"explain {look}", values).scalars()) for look, values in looks
    ]
    assert len(plans) == 4
    assert [plan for plan in plans if "ix_jobs_unfinished" not in plan] == []


# The value, how many of 20,000 jobs have it, and how many pages of 8 kB a list of 20 may read for it. The table has
# 1,600. Behind the one job of a value comes no other; the lists of others begin at the newest and in the middle.
@pytest.mark.parametrize(
    ("metadata", "jobs", "pages_read"),
    [
        ({"sha": "7"}, 1, 10),
        ({"pipeline": "p7"}, 20, 120),
        ({"team": "t7"}, 200, 120),
        ({"even": "0"}, 10_000, 120),
        ({"team": "t7", "even": "1"}, 200, 210),
    ],
)
@pytest.mark.parametrize("after", [None, "ftjob-000010000"])
def test_a_list_by_metadata_reads_few_pages_however_many_jobs_match(
    session: Session, metadata: dict[str, str], jobs: int, pages_read: int, after: str | None
) -> None:
    caller = make_caller(session)
    _multiply(session, make_job(session, caller).id, by=20_000)
    said: list[tuple[str, Any]] = []
    event.listen(session.connection(), "before_cursor_execute", lambda *call: said.append((call[2], call[3])))

    rows, more = pages.jobs(
        session, project_id=caller.project_id, after=after, limit=20, metadata=metadata, without_metadata=False
    )

    statement, values = said[-1]
    (plan,) = (
        session.connection()
        .exec_driver_sql(f"explain (analyze, buffers, format json) {statement}", values)
        .scalar_one()
    )
    assert plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"] <= pages_read
    listed = jobs if after is None or jobs == 1 else jobs // 2
    assert more is (listed > 20)
    ids = [row.id for row in rows]
    assert ids == sorted(ids, reverse=True)
    assert len(ids) == min(listed, 20)
    assert {pair in (row.job_metadata or {}).items() for row in rows for pair in metadata.items()} == {True}


def _multiply(session: Session, job_id: str, *, by: int) -> None:
    """Copies of a job, each with a value of its own, and some that a thousandth, a hundredth and half of them share."""
    names = ", ".join(column.name for column in inspect(JobRow).columns if column.name not in ("id", "metadata"))
    session.execute(
        text(
            f"""insert into jobs (id, metadata, {names})
            select 'ftjob-0' || lpad(g::text, 8, '0'), jsonb_build_object(
                'sha', g::text, 'pipeline', 'p' || g % 1000, 'team', 't' || g % 100, 'even', (g % 2)::text), {names}
            from jobs, generate_series(1, :by) g where id = :job_id"""  # noqa: S608  # our own column names
        ),
        {"by": by, "job_id": job_id},
    )
    session.execute(text("select gin_clean_pending_list('ix_jobs_metadata')"))
    session.execute(text("analyze jobs, job_labels"))


def test_a_retry_of_the_same_post_is_the_same_job_and_a_new_post_is_not(session: Session) -> None:
    caller = make_caller(session)
    request = make_request(make_file(session, caller).id)

    first = submission.submit(session, request, caller=caller, base=SMOLLM2.ref, request_sha256="a")
    again = submission.submit(session, request, caller=caller, base=SMOLLM2.ref, request_sha256="a", retried=True)
    meant = submission.submit(session, request, caller=caller, base=SMOLLM2.ref, request_sha256="a")

    assert again.replayed
    assert again.job.id == first.job.id
    assert meant.job.id != first.job.id


def test_an_idempotency_key_makes_one_job_and_refuses_another_body(session: Session) -> None:
    caller = make_caller(session)
    request = make_request(make_file(session, caller).id)
    common = {"caller": caller, "base": SMOLLM2.ref, "idempotency_key": "k"}

    first = submission.submit(session, request, request_sha256="a", **common)
    again = submission.submit(session, request, request_sha256="a", **common)

    assert again.replayed
    assert again.job.id == first.job.id
    with pytest.raises(Conflict):
        submission.submit(session, request, request_sha256="b", **common)


def test_another_projects_file_does_not_exist(session: Session) -> None:
    theirs = make_file(session, make_caller(session))

    with pytest.raises(Invalid, match="does not exist") as refused:
        make_job(session, make_caller(session), file=theirs)

    assert refused.value.param == "training_file"


def test_a_project_at_its_limit_is_told_so(session: Session) -> None:
    caller = make_caller(session, max_queued=1)
    make_job(session, caller)

    with pytest.raises(LimitReached, match="limit is 1"):
        make_job(session, caller)


def test_a_newer_job_of_a_group_supersedes_the_waiting_one(session: Session) -> None:
    caller = make_caller(session)
    queue = {"queue": {"group": "main", "supersede": True}}
    older = make_job(session, caller, tunepool=queue)
    newer = make_job(session, caller, tunepool=queue)

    session.refresh(older)

    assert (older.status, newer.status) == ("cancelled", "validating_files")
    assert (older.superseded_by, newer.superseded_by) == (newer.id, None)


@pytest.mark.parametrize(("supersede", "asked"), [(True, False), ("running", True)])
def test_a_running_job_of_a_group_is_superseded_only_where_that_is_asked(
    session: Session, *, supersede: bool | str, asked: bool
) -> None:
    caller = make_caller(session)
    older = make_queued_job(session, caller, tunepool={"queue": {"group": "main"}})
    assert claim_on(session, make_worker(session)) is not None

    newer = make_job(session, caller, tunepool={"queue": {"group": "main", "supersede": supersede}})
    session.refresh(older)

    assert older.status == "running"
    assert (older.cancel_requested_at is not None) == asked
    assert older.superseded_by == (newer.id if asked else None)


def test_a_claim_leases_job_and_device_together_and_only_once(session: Session) -> None:
    job, claim = started(session)
    worker_id = claim.lease.worker_id

    second = moves.claim_training(session, worker_id=worker_id, pool_name="default", lease_seconds=60)
    device = session.scalars(select(DeviceRow).where(DeviceRow.worker_id == worker_id)).one()

    assert second is None
    assert (job.status, job.fence) == ("running", claim.lease.fence)
    assert (device.leased_by, device.fence) == (job.id, job.fence)


def test_success_publishes_adapter_manifest_and_metrics_file_at_once(session: Session) -> None:
    job, claim = started(session)
    file = NewFile(
        id="file-metrics", filename="step_metrics.csv", purpose="fine-tune-results", bytes=1, sha256="0", key="k"
    )

    assert moves.succeed(session, claim.lease, manifest=MANIFEST, result_file=file, trained_tokens=7)

    session.refresh(job)
    adapter = session.scalars(select(AdapterRow).where(AdapterRow.job_id == job.id)).one()
    assert (job.status, job.fine_tuned_model, job.result_file) == ("succeeded", adapter.name, "file-metrics")
    assert session.get_one(FileRow, "file-metrics").status == "processed"
    assert (
        session.scalars(select(DeviceRow.leased_by).where(DeviceRow.worker_id == claim.lease.worker_id)).one() is None
    )
    assert session.scalars(select(AttemptRow.outcome).where(AttemptRow.job_id == job.id)).one() == "succeeded"


def test_a_cancel_that_was_asked_first_wins_over_success(session: Session) -> None:
    job, claim = started(session)

    moves.request_cancel(session, job.id, project_id=job.project_id)

    assert not moves.succeed(session, claim.lease, manifest=MANIFEST)
    assert moves.confirm_cancelled(session, claim.lease)
    session.refresh(job)
    assert job.status == "cancelled"


def test_a_cancel_after_success_is_refused(session: Session) -> None:
    job, claim = started(session)
    moves.succeed(session, claim.lease, manifest=MANIFEST)

    with pytest.raises(Invalid, match="already succeeded"):
        moves.request_cancel(session, job.id, project_id=job.project_id)


@pytest.mark.parametrize("write", ["heartbeat", "record", "record_checkpoint", "succeed", "fail", "confirm_paused"])
def test_a_lost_lease_can_write_nothing(session: Session, settings: Settings, write: str) -> None:
    job, claim = started(session)
    moves.give_back(session, claim.lease, outcome="drained", code="drained", message="Drained.", settings=settings)
    arguments = {
        "heartbeat": {"lease_seconds": 60},
        "record": {"events": [NewEvent("x")]},
        "record_checkpoint": {"step": 1, "name": "n", "metrics": {}, "manifest": {}},
        "succeed": {"manifest": MANIFEST},
        "fail": {"code": "c", "message": "m"},
        "confirm_paused": {},
    }[write]

    assert not getattr(moves, write)(session, claim.lease, **arguments)
    session.refresh(job)
    assert job.status == "queued"


def test_a_dead_workers_job_is_queued_again_with_its_device_free_and_the_attempt_counted(
    session: Session, settings: Settings
) -> None:
    job, claim = started(session)
    session.execute(update(JobRow).where(JobRow.id == job.id).values(lease_until=func.now() - timedelta(seconds=16)))

    assert moves.reap(session, settings=settings) == [job.id]

    session.refresh(job)
    assert (job.status, job.failures) == ("queued", 1)
    assert (
        session.scalars(select(DeviceRow.leased_by).where(DeviceRow.worker_id == claim.lease.worker_id)).one() is None
    )


def test_a_lease_within_its_grace_is_left_alone(session: Session, settings: Settings) -> None:
    job, _ = started(session)
    session.execute(update(JobRow).where(JobRow.id == job.id).values(lease_until=func.now() - timedelta(seconds=14)))

    assert moves.reap(session, settings=settings) == []


def test_a_job_that_ends_every_worker_fails_after_its_attempts(session: Session, settings: Settings) -> None:
    job = make_queued_job(session, make_caller(session))
    worker = make_worker(session)
    for _ in range(settings.max_attempts):
        claim = claim_on(session, worker)
        assert claim is not None
        moves.give_back(
            session, claim.lease, outcome="crashed", code="trainer_crashed", message="Died.", settings=settings
        )

    session.refresh(job)
    assert (job.status, job.error and job.error["code"]) == ("failed", "trainer_crashed")
    assert claim_on(session, worker) is None


def test_a_drain_uses_up_no_attempt(session: Session, settings: Settings) -> None:
    job, claim = started(session)

    moves.give_back(session, claim.lease, outcome="drained", code="drained", message="Drained.", settings=settings)

    session.refresh(job)
    assert (job.status, job.failures, job.not_before) == ("queued", 0, None)


def test_the_database_itself_refuses_to_reopen_an_ended_job(session: Session) -> None:
    job, claim = started(session)
    moves.succeed(session, claim.lease, manifest=MANIFEST)

    with pytest.raises(IntegrityError, match="is final"):
        session.execute(text("update jobs set status = 'queued', manifest = null where id = :id"), {"id": job.id})


def test_the_charge_at_the_lease_becomes_the_real_one_at_the_end(session: Session) -> None:
    job, claim = started(session)
    charged = session.get_one(ProjectRow, job.project_id).usage
    moves.succeed(session, claim.lease, manifest=MANIFEST)

    project = session.get_one(ProjectRow, job.project_id, populate_existing=True)

    assert charged > 0
    assert project.usage == pytest.approx(0.0, abs=1e-6)


def test_events_are_numbered_without_gaps(session: Session) -> None:
    job, claim = started(session)
    moves.record(session, claim.lease, [NewEvent(f"Step {n}") for n in range(5)])
    moves.record(session, claim.lease, [NewEvent("more")])

    numbers = session.scalars(select(EventRow.seq).where(EventRow.job_id == job.id).order_by(EventRow.seq)).all()

    assert numbers == list(range(1, len(numbers) + 1))


def test_a_paused_job_is_not_started_and_a_resumed_one_is(session: Session) -> None:
    job = make_queued_job(session, make_caller(session))
    worker = make_worker(session)
    moves.request_pause(session, job.id, project_id=job.project_id)

    assert claim_on(session, worker) is None

    moves.resume(session, job.id, project_id=job.project_id)
    assert claim_on(session, worker) is not None


def test_a_job_whose_file_is_unchecked_is_not_validated_yet(session: Session) -> None:
    caller = make_caller(session)
    file = make_file(session, caller, status="uploaded")
    make_job(session, caller, file=file)

    assert moves.claim_validation(session, worker_id="w", lease_seconds=60) is None

    file.status = "processed"
    session.flush()
    assert moves.claim_validation(session, worker_id="w", lease_seconds=60) is not None


def test_a_job_is_settled_where_its_base_model_lies_unless_nobody_else_has_it(session: Session) -> None:
    caller = make_caller(session)
    job = make_job(session, caller)
    other = make_worker(session, cached_models=[job.base_model])

    def claimed(**options: Any) -> bool:
        claim = moves.claim_validation(session, worker_id="w", lease_seconds=60, **options)
        return claim is not None

    assert not claimed(lacking=[job.base_model])
    assert not claimed(lacking=["another", job.base_model])
    other.draining = True  # it begins nothing new
    session.flush()
    assert claimed(lacking=[job.base_model])


def test_a_job_is_settled_by_a_host_without_its_base_model_where_no_live_one_has_it(session: Session) -> None:
    caller = make_caller(session)
    job = make_job(session, caller)
    other = make_worker(session, cached_models=[job.base_model])
    make_worker(session, cached_models=["another"])
    other.last_seen = func.now() - timedelta(hours=1)
    session.flush()

    assert moves.claim_validation(session, worker_id="w", lease_seconds=60, lacking=[job.base_model]) is not None
