"""What autoscalers read says the same as the plan does, and costs little."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from shared.fleet import snapshot
from shared.plan.capacity import Device
from shared.plan.fairshare import GIB
from shared.plan.scheduling import plan
from shared.settle.catalogue import SMOLLM2
from shared.store.tables import JobRow, PoolRow, ProjectRow
from shared.tenants.keys import Caller
from tests.charts import BUNDLED, H100, documents
from tests.factories import make_caller, make_queued_job

KINDS: list[dict[str, Any]] = [
    {"kind": "cuda", "bytes": 80 * GIB, "capability": 90, "bfloat16": True},
    {"kind": "cuda", "bytes": 16 * GIB, "capability": 75, "bfloat16": False},
    {"kind": "rocm", "bytes": 64 * GIB, "capability": 0, "bfloat16": True},
    {"kind": "cpu", "bytes": 32 * GIB, "capability": 0, "bfloat16": False},
]
COULD_RUN = text(
    "SELECT job_id, project_id FROM queue_depth WHERE could_run(queue_depth, :kind, :bytes, :capability, :bfloat16)"
)


def started(session: Session, kind: dict[str, Any]) -> list[tuple[str, str]]:
    """Job and project of what the plan starts where more than enough such devices are idle."""
    view = snapshot.snapshot(session, pool_name="default")
    devices = [
        Device(
            id=f"h{host}:{index}",
            host=f"h{host}",
            total_bytes=kind["bytes"],
            free_bytes=kind["bytes"],
            kind=kind["kind"],
            cached_models=frozenset({SMOLLM2.ref.name}),
            bfloat16=kind["bfloat16"],
            capability=kind["capability"] or None,
        )
        for host in range(200)
        for index in range(4)
    ]
    made = plan(view.queue, view.running, devices, view.shares, policy=replace(view.policy, held=False), now=view.now)
    projects = {job.id: job.project for job in view.queue}
    return [(assignment.job_id, projects[assignment.job_id]) for assignment in made.assignments]


def seen(session: Session, kind: dict[str, Any]) -> list[tuple[str, str]]:
    return [(row.job_id, row.project_id) for row in session.execute(COULD_RUN, kind)]


def shuffle(session: Session, jobs: list[JobRow], chance: random.Random) -> None:
    now = session.scalars(select(func.now())).one()
    for job in jobs:
        job.gpus, job.nodes = chance.choice([(1, 1), (1, 1), (2, 1), (4, 1), (2, 2)])
        job.bytes_per_device = chance.choice([0, GIB, 14 * GIB, 15 * GIB, 30 * GIB, 72 * GIB, 73 * GIB, 500 * GIB])
        job.needs_gpu, job.needs_bfloat16 = chance.random() < 0.3, chance.random() < 0.3
        job.needs_capability = chance.choice([None, None, 75, 80, 90, 100])
        job.held = chance.random() < 0.15
        job.not_before = chance.choice([None, None, now - timedelta(hours=1), now + timedelta(hours=1)])
    session.flush()


@pytest.mark.parametrize("seed", range(3))
def test_a_job_counts_for_a_kind_of_device_when_the_plan_would_start_it_there(session: Session, seed: int) -> None:
    callers = [make_caller(session) for _ in range(3)]
    jobs = [make_queued_job(session, callers[index % 3]) for index in range(12)]
    session.get_one(ProjectRow, callers[2].project_id).held = seed % 2 == 1
    chance = random.Random(seed)

    for _ in range(4):
        shuffle(session, jobs, chance)
        for kind in KINDS:
            assert sorted(seen(session, kind)) == sorted(started(session, kind))


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        ({"max_running": 0}, 0),
        ({"max_running": 2}, 2),
        ({"budget_device_seconds": 0.0}, 0),
        ({"budget_device_seconds": 250.0}, 2),
        ({"budget_device_seconds": 1e9, "max_running": 3}, 3),
    ],
)
def test_limits_of_a_project_bound_what_counts_as_they_bound_what_starts(
    session: Session, limits: dict[str, Any], most: int
) -> None:
    bounded, free = make_caller(session), make_caller(session)
    for name, value in limits.items():
        setattr(session.get_one(ProjectRow, bounded.project_id), name, value)
    for caller in (bounded, free):
        for _ in range(5):
            make_queued_job(session, caller).expected_seconds = 100.0
    session.flush()

    counted = Counter(project for _, project in seen(session, KINDS[0]))

    assert counted == Counter({bounded.project_id: most, free.project_id: 5}) - Counter()
    assert counted == Counter(project for _, project in started(session, KINDS[0]))


def test_a_key_that_may_run_one_job_counts_one(session: Session) -> None:
    caller = make_caller(session)
    limit_key(session, caller, 1)
    for _ in range(3):
        make_queued_job(session, caller)

    assert len(seen(session, KINDS[0])) == len(started(session, KINDS[0])) == 1


def limit_key(session: Session, caller: Caller, most: int) -> None:
    session.execute(text("UPDATE api_keys SET max_running = :most WHERE id = :id"), {"most": most, "id": caller.key_id})


def test_the_query_of_the_chart_counts_what_works_and_what_waits(session: Session) -> None:
    caller = make_caller(session)
    for _ in range(3):
        make_queued_job(session, caller).bytes_per_device = 20 * GIB
    values = {**BUNDLED, "workers": {"gpu": {"gpus": 2, "scaling": {"enabled": True, **H100}}}}
    scaled = next(document for document in documents(values) if document["kind"] == "ScaledObject")
    trigger = scaled["spec"]["triggers"][0]["metadata"]
    session.flush()

    assert session.scalars(text(trigger["query"])).one() == 3
    assert trigger["targetQueryValue"] == "2"

    session.add(PoolRow(name="default", held=True))
    session.flush()
    assert session.scalars(text(trigger["query"])).one() == 0


def test_a_long_queue_is_counted_in_one_pass_over_it(session: Session) -> None:
    caller = make_caller(session)
    job = make_queued_job(session, caller)
    names = [column.name for column in JobRow.__table__.columns if column.name != "id"]
    columns = ", ".join(names)
    session.execute(
        text(
            f"INSERT INTO jobs (id, {columns}) SELECT id || '-' || n, {columns} FROM jobs, generate_series(1, 3000) n "  # noqa: S608
            "WHERE id = :id"
        ),
        {"id": job.id},
    )

    made = session.scalars(text("EXPLAIN (ANALYZE, TIMING OFF) SELECT count(*) FROM queue_depth")).all()

    assert session.scalars(text("SELECT count(*) FROM queue_depth")).one() == 3001
    loops = [int(line.rsplit("loops=", 1)[1].split(")")[0]) for line in made if "on jobs" in line and "loops=" in line]
    assert max(loops) <= 2, made
