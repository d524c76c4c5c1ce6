"""Who comes along with a job that starts: case by case, and what holds for every pool and queue."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.fleet.snapshot import as_one
from shared.plan.companions import CommonGround, Company, companions
from shared.plan.fairshare import GIB
from shared.plan.scheduling import Device, Plan, Policy, QueuedJob, RunningJob, Share, charge, plan

NOON = datetime(2026, 6, 2, 12, tzinfo=UTC)
POLICY = Policy()
COMPANY = Company(most=4, longest_seconds=600)
BASE = CommonGround("tiny", 8 * GIB)


def job(job_id: str, **changes: Any) -> QueuedJob:
    """Jobs wait in the order of their ids."""
    values: dict[str, Any] = {
        "id": job_id,
        "project": "red",
        "key": "k",
        "submitted_at": NOON - timedelta(hours=1),
        "expected_seconds": 60.0,
        "bytes_per_device": 10 * GIB,
    }
    return QueuedJob(**{**values, **changes})


def device(device_id: str = "gpu", *, gib: int = 24, **changes: Any) -> Device:
    return Device(id=device_id, host="h", total_bytes=gib * GIB, free_bytes=gib * GIB, **changes)


World = tuple[
    Sequence[QueuedJob], Sequence[RunningJob], Sequence[Device], Sequence[Share], dict[str, CommonGround], Company
]


def decided(world: World) -> tuple[Plan, list[tuple[str, ...]]]:
    """The plan, and who comes along with each job that starts."""
    queue, running, devices, shares, grounds, company = world
    made = plan(queue, running, devices, shares, policy=POLICY, now=NOON)
    groups = [
        companions(
            made,
            start,
            queue=queue,
            devices=devices,
            shares=shares,
            grounds=grounds,
            policy=POLICY,
            company=company,
        )
        for start in made.assignments
    ]
    return made, groups


def along(
    queue: Sequence[QueuedJob],
    *,
    devices: Sequence[Device] = (device(),),
    running: Sequence[RunningJob] = (),
    shares: Sequence[Share] = (),
    grounds: dict[str, CommonGround] | None = None,
    company: Company = COMPANY,
) -> list[str]:
    """The companions of the first job that starts."""
    shared = {job.id: BASE for job in queue} if grounds is None else grounds
    return list(decided((queue, running, devices, shares, shared, company))[1][0])


def test_waiting_jobs_of_the_same_ground_come_along_in_their_order_up_to_the_most() -> None:
    assert along([job(f"j{n}") for n in range(6)]) == ["j1", "j2", "j3"]


def test_the_base_counts_once_and_each_jobs_own_parts_are_added() -> None:
    few = [job(f"j{n}") for n in range(4)]  # 10 GiB alone, 2 of them its own

    assert along(few, devices=[device(gib=14)]) == ["j1", "j2"]
    assert along(few, devices=[device(gib=13)]) == ["j1"]
    assert along(few, devices=[device(gib=11)]) == []


def test_a_job_that_could_use_the_device_and_cannot_come_along_is_not_overtaken() -> None:
    others = dict.fromkeys(("j0", "j2"), BASE)

    assert along([job("j0"), job("j1"), job("j2")], grounds=others) == []


def test_a_job_that_could_never_use_the_device_is_passed_over() -> None:
    large = job("j1", bytes_per_device=70 * GIB)
    busy = RunningJob("r", "red", "k", "normal", 0, ("gpu-80",), NOON, preemptible=False)

    assert along([job("j0"), large, job("j2")], devices=[device(), device("gpu-80", gib=80)], running=[busy]) == ["j2"]


def test_a_job_that_waits_for_something_else_than_a_device_neither_comes_along_nor_is_in_the_way() -> None:
    assert along([job("j0"), job("j1", held=True), job("j2")]) == ["j2"]


@pytest.mark.parametrize(
    "changes",
    [
        {"expected_seconds": None},
        {"expected_seconds": 601.0},
        {"max_runtime_seconds": 60.0},
        {"preemptible": False},
        {"tier": "best_effort"},
        {"project": "blue"},
        {"gpus": 2},
    ],
)
def test_who_is_unlike_the_leading_job_does_not_come_along(changes: dict[str, Any]) -> None:
    assert along([job("j0"), job("j1", **changes)], devices=[device()]) == []


@pytest.mark.parametrize(
    "changes", [{"expected_seconds": None}, {"expected_seconds": 601.0}, {"max_runtime_seconds": 9}]
)
def test_nobody_comes_along_with_a_job_that_is_not_small(changes: dict[str, Any]) -> None:
    assert along([job("j0", **changes), job("j1")]) == []


def test_jobs_of_other_projects_come_along_where_that_is_allowed() -> None:
    queue = [job("j0"), job("j1", project="blue"), job("j2")]

    assert along(queue) == []
    assert along(queue, company=replace(COMPANY, across_projects=True)) == ["j1", "j2"]


def test_no_budget_is_exceeded_by_companions() -> None:
    queue = [job(f"j{n}") for n in range(4)]

    assert along(queue, shares=[Share("red", budget_left_seconds=130.0)]) == ["j1"]


def test_nobody_comes_along_on_a_place_in_a_cluster_or_to_a_job_on_several_devices() -> None:
    assert along([job("j0"), job("j1")], devices=[device(of_cluster=True)]) == []
    pair = [device("gpu-0"), device("gpu-1")]
    assert along([job("j0", gpus=2), job("j1")], devices=pair) == []


def test_a_group_is_one_job_to_the_plan_which_lasts_as_long_as_all_have_left() -> None:
    def runs(job_id: str, **changes: Any) -> RunningJob:
        plain = RunningJob(job_id, "red", "k", "normal", 0, ("gpu",), NOON, expected_seconds_left=60.0)
        return replace(plain, **changes)

    group = as_one([runs("b"), runs("a", preempt_requested=True), runs("c", priority=2)])

    assert (group.id, group.companions, group.expected_seconds_left) == ("a", ("b", "c"), 180.0)
    assert (group.preempt_requested, group.priority) == (False, 2)
    assert as_one([runs("a", expected_seconds_left=None), runs("b")]).expected_seconds_left is None
    assert as_one([runs("a", preempt_requested=True), runs("b", preempt_requested=True)]).preempt_requested


# ---- every pool and queue

PROJECTS = ("red", "blue")


@st.composite
def worlds(draw: st.DrawFn) -> World:
    devices = [
        device(f"d{n}", gib=draw(st.sampled_from((12, 24, 80))), kind=draw(st.sampled_from(("cuda", "cuda", "cpu"))))
        for n in range(draw(st.integers(1, 3)))
    ]
    busy = [d for d in devices if draw(st.integers(0, 3)) == 0]
    long_ago = NOON - timedelta(hours=1)
    running = [
        RunningJob(f"r-{d.id}", draw(st.sampled_from(PROJECTS)), "k", "best_effort", 0, (d.id,), long_ago) for d in busy
    ]
    queue = [
        job(
            f"j{n:02}",
            project=draw(st.sampled_from(("red", "red", "blue"))),
            tier=draw(st.sampled_from(("normal", "normal", "normal", "interactive", "best_effort"))),
            submitted_at=NOON - timedelta(hours=draw(st.integers(0, 30))),
            expected_seconds=draw(st.sampled_from((None, 60.0, 60.0, 300.0, 3600.0))),
            max_runtime_seconds=draw(st.sampled_from((None, None, None, 600.0))),
            bytes_per_device=draw(st.sampled_from((9, 10, 11, 20, 60))) * GIB,
            gpus=draw(st.sampled_from((1, 1, 1, 1, 2))),
            held=draw(st.integers(0, 7)) == 0,
            needs_gpu=draw(st.integers(0, 3)) == 0,
            preemptible=draw(st.integers(0, 3)) > 0,
        )
        for n in range(draw(st.integers(2, 10)))
    ]
    shares = [
        Share(
            project,
            usage=draw(st.sampled_from((0.0, 10_000.0))),
            budget_left_seconds=draw(st.sampled_from((None, None, 200.0))),
            max_running=draw(st.sampled_from((None, None, 1))),
        )
        for project in PROJECTS
    ]
    words = st.sampled_from(("tiny", "tiny", "tiny", "other"))
    grounds = {job.id: CommonGround(draw(words), 8 * GIB) for job in queue if draw(st.integers(0, 5)) > 0}
    company = Company(
        most=draw(st.integers(2, 5)),
        longest_seconds=draw(st.sampled_from((60.0, 600.0))),
        across_projects=draw(st.booleans()),
    )
    return queue, running, devices, shares, grounds, company


@settings(max_examples=200)
@given(worlds())
def test_a_group_fits_its_device_with_the_base_counted_once(world: World) -> None:
    queue, _, devices, _, grounds, _ = world
    jobs, pool = {job.id: job for job in queue}, {device.id: device for device in devices}
    made, groups = decided(world)

    for start, others in zip(made.assignments, groups, strict=True):
        own = sum(jobs[job_id].bytes_per_device - grounds[job_id].base_bytes for job_id in others)
        assert jobs[start.job_id].bytes_per_device + own <= pool[start.device_ids[0]].free_bytes


@settings(max_examples=200)
@given(worlds())
def test_a_group_is_what_the_rules_allow(world: World) -> None:
    queue, _, _, _, grounds, company = world
    jobs = {job.id: job for job in queue}
    made, groups = decided(world)

    for start, others in zip(made.assignments, groups, strict=True):
        group = [jobs[start.job_id], *(jobs[job_id] for job_id in others)]
        if not others:
            continue
        assert len(group) <= company.most
        assert len({grounds[job.id].words for job in group}) == 1
        assert len({(job.tier, job.preemptible) for job in group}) == 1
        assert company.across_projects or len({job.project for job in group}) == 1
        for member in group:
            assert member.expected_seconds is not None
            assert member.expected_seconds <= company.longest_seconds
            assert (member.devices, member.max_runtime_seconds, member.held) == (1, None, False)
        assert set(others) <= set(made.verdicts)  # no device was theirs


@settings(max_examples=300)
@given(worlds())
def test_nobody_who_could_have_used_the_device_is_overtaken(world: World) -> None:
    """So whoever is first in line, and not in the group, waits for no job that was behind it."""
    _, _, devices, _, _, _ = world
    pool = {device.id: device for device in devices}
    made, groups = decided(world)

    line = [turn for turn in made.verdicts.turns() if turn.in_line]
    for start, others in zip(made.assignments, groups, strict=True):
        place = pool[start.device_ids[0]]
        last = max((n for n, turn in enumerate(line) if turn.job.id in others), default=-1)
        for turn in line[: last + 1]:
            if turn.job.id not in others:
                promised = "promised to this job" in made.verdicts[turn.job.id].detail
                able = turn.job.needs.met_by(place) and turn.job.bytes_per_device <= place.free_bytes
                assert promised or not able


@settings(max_examples=200)
@given(worlds())
def test_no_budget_is_exceeded_by_a_group_and_the_jobs_that_start_beside_it(world: World) -> None:
    queue, _, _, shares, _, _ = world
    jobs = {job.id: job for job in queue}
    made, groups = decided(world)

    for others in groups:
        starting = [*(start.job_id for start in made.assignments), *others]
        for share in shares:
            mine = [jobs[job_id] for job_id in starting if jobs[job_id].project == share.project]
            cost = sum(charge(job, policy=POLICY) for job in mine)
            assert share.budget_left_seconds is None or cost <= share.budget_left_seconds


@settings(max_examples=100)
@given(worlds(), st.randoms(use_true_random=False))
def test_a_group_does_not_depend_on_the_order_of_the_arguments(world: World, shuffler: random.Random) -> None:
    queue, running, devices, shares, grounds, company = world
    mixed = tuple([list(part) for part in (queue, running, devices, shares)])
    for part in mixed:
        shuffler.shuffle(part)  # type: ignore[arg-type]

    assert decided(world)[1] == decided((*mixed, grounds, company))[1]  # type: ignore[arg-type]
