"""What `plan()` promises for every pool and queue, and over the whole life of a random load."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.plan.fairshare import GIB
from shared.plan.scheduling import Device, Plan, Policy, QueuedJob, RunningJob, Share, charge, plan

NOON = datetime(2026, 6, 2, 12, tzinfo=UTC)
PROJECTS = ("red", "blue", "green")
KEYS = ("ci", "person")
POLICY = Policy()
State = tuple[list[QueuedJob], list[RunningJob], list[Device], list[Share]]

quickly = settings(max_examples=60)
tiers = st.sampled_from(("interactive", "normal", "best_effort"))
seconds = st.sampled_from((None, 60.0, 600.0, 3600.0, 36_000.0))


@st.composite
def device_lists(draw: st.DrawFn) -> list[Device]:
    found = []
    for host in range(draw(st.integers(1, 3))):
        for n in range(draw(st.integers(1, 4))):
            total = draw(st.sampled_from((24, 80))) * GIB
            foreign = draw(st.sampled_from((0, 0, 0, 0, GIB, 20 * GIB)))
            found.append(
                Device(
                    id=f"h{host}-{n}",
                    host=f"h{host}",
                    total_bytes=total,
                    free_bytes=total - foreign,
                    foreign_bytes=foreign,
                    healthy=draw(st.integers(0, 9)) > 0,
                    draining=draw(st.integers(0, 9)) == 0,
                )
            )
    return found


@st.composite
def queues(draw: st.DrawFn) -> list[QueuedJob]:
    return [
        QueuedJob(
            id=f"q{n}",
            project=draw(st.sampled_from(PROJECTS)),
            key=draw(st.sampled_from(KEYS)),
            tier=draw(tiers),
            priority=draw(st.integers(0, 2)),
            submitted_at=NOON - timedelta(hours=draw(st.integers(0, 30))),
            gpus=draw(st.sampled_from((1, 1, 1, 2, 3))),
            nodes=draw(st.sampled_from((1, 1, 1, 2))),
            bytes_per_device=draw(st.sampled_from((0, 10, 21, 22, 40, 90))) * GIB,
            max_runtime_seconds=draw(seconds),
            expected_seconds=draw(seconds),
            not_before=draw(st.sampled_from((None, None, None, NOON + timedelta(minutes=1)))),
            preemptible=draw(st.booleans()),
            held=draw(st.integers(0, 9)) == 0,
        )
        for n in range(draw(st.integers(0, 12)))
    ]


@st.composite
def states(draw: st.DrawFn) -> State:
    devices, queue, running = draw(device_lists()), draw(queues()), list[RunningJob]()
    waiting = list(devices)
    while waiting and draw(st.integers(0, 3)) > 0:
        count = min(len(waiting), draw(st.sampled_from((1, 1, 1, 2, 3))))
        held, waiting = waiting[:count], waiting[count:]
        running.append(
            RunningJob(
                id=f"r{len(running)}",
                project=draw(st.sampled_from(PROJECTS)),
                key=draw(st.sampled_from(KEYS)),
                tier=draw(tiers),
                priority=0,
                device_ids=tuple(device.id for device in held),
                started_at=NOON - timedelta(minutes=draw(st.integers(0, 40))),
                max_runtime_seconds=draw(seconds),
                preemptible=draw(st.integers(0, 3)) > 0,
                preempt_requested=draw(st.integers(0, 9)) == 0,
                backfill=draw(st.integers(0, 3)) == 0,
            )
        )
    shares = [
        Share(
            project,
            weight=draw(st.sampled_from((1.0, 2.0))),
            usage=draw(st.sampled_from((0.0, 3000.0, 10_000.0, 200_000.0))),
            guarantee=draw(st.integers(0, 3)),
            max_running=draw(st.sampled_from((None, None, 1, 4))),
            key_max_running={"ci": draw(st.integers(0, 3))} if draw(st.booleans()) else {},
            budget_left_seconds=draw(st.sampled_from((None, None, None, 5000.0))),
        )
        for project in PROJECTS
    ]
    return queue, running, devices, shares


def decide(state: State, *, now: datetime = NOON, policy: Policy = POLICY) -> Plan:
    return plan(*state, policy=policy, now=now)


@quickly
@given(states())
def test_a_job_only_gets_devices_that_are_free_healthy_and_large_enough(state: State) -> None:
    queue, running, devices, _ = state
    jobs, pool = {job.id: job for job in queue}, {device.id: device for device in devices}
    busy = [device_id for job in running for device_id in job.device_ids]

    taken = []
    for assignment in decide(state).assignments:
        job = jobs[assignment.job_id]
        assert not job.held
        for device_id in assignment.device_ids:
            assert pool[device_id].usable
            assert pool[device_id].free_bytes >= job.bytes_per_device
            assert pool[device_id].foreign_bytes <= POLICY.foreign_tolerance_bytes
        taken += assignment.device_ids
    assert len({*taken, *busy}) == len(taken) + len(busy)


@quickly
@given(states())
def test_a_gang_starts_whole_with_its_devices_on_each_host_together(state: State) -> None:
    jobs, pool = {job.id: job for job in state[0]}, {device.id: device for device in state[2]}

    for assignment in decide(state).assignments:
        job = jobs[assignment.job_id]
        assert Counter(Counter(pool[d].host for d in assignment.device_ids).values()) == {job.gpus: job.nodes}


@quickly
@given(states())
def test_no_plan_exceeds_a_cap_or_a_budget(state: State) -> None:
    queue, running, _, shares = state
    jobs = {job.id: job for job in queue}
    fresh = [jobs[assignment.job_id] for assignment in decide(state).assignments]

    for share in shares:
        mine = [job for job in fresh if job.project == share.project]
        held = sum(len(job.device_ids) for job in running if job.project == share.project)
        if mine and share.max_running is not None:
            assert held + sum(job.devices for job in mine) <= share.max_running
        if share.budget_left_seconds is not None:
            assert sum(charge(job, policy=POLICY) for job in mine) <= share.budget_left_seconds
        for key, cap in share.key_max_running.items():
            held = sum(len(job.device_ids) for job in running if (job.project, job.key) == (share.project, key))
            new = [job.devices for job in mine if job.key == key]
            assert not new or held + sum(new) <= cap


@quickly
@given(states())
def test_every_queued_job_either_starts_or_has_one_verdict_that_can_be_read(state: State) -> None:
    decision = decide(state)

    assert sorted([*(a.job_id for a in decision.assignments), *decision.verdicts]) == sorted(job.id for job in state[0])
    for verdict in decision.verdicts.values():
        assert verdict.position == verdict.jobs_ahead + 1
        assert verdict.detail
        assert verdict.eta_low is None or verdict.eta_high is None or NOON <= verdict.eta_low <= verdict.eta_high


@quickly
@given(states(), st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_of_its_arguments(state: State, shuffler: random.Random) -> None:
    mixed = [list(part) for part in state]
    for part in mixed:
        shuffler.shuffle(part)
    one, two = decide(state), plan(*mixed, policy=POLICY, now=NOON)

    assert (one.assignments, one.preemptions) == (two.assignments, two.preemptions)
    assert list(one.verdicts.items()) == list(two.verdicts.items())


@quickly
@given(states())
def test_only_willing_jobs_past_their_minimum_are_stopped_once_each_and_only_for_jobs_that_then_fit(
    state: State,
) -> None:
    running = {job.id: job for job in state[1]}
    decision = decide(state)

    victims = [preemption.victim_id for preemption in decision.preemptions]
    assert len(victims) == len(set(victims))
    for victim in (running[victim_id] for victim_id in victims):
        assert victim.preemptible or victim.tier == "best_effort"
        assert not victim.preempt_requested
        assert NOON - victim.started_at >= POLICY.min_runtime
    left = [job for job in state[1] if job.id not in victims]
    for job_id in {preemption.for_job_id for preemption in decision.preemptions}:
        alone = [job for job in state[0] if job.id == job_id]
        freed = [replace(device, free_bytes=device.total_bytes - device.foreign_bytes) for device in state[2]]
        unlimited = [Share(share.project) for share in state[3]]
        gone = [job for job in left if not job.preempt_requested]
        assert [a.job_id for a in decide((alone, gone, freed, unlimited)).assignments] == [job_id]


def requeued(job: RunningJob, *, pool: dict[str, Device]) -> QueuedJob:
    hosts = len({pool[device_id].host for device_id in job.device_ids})
    return QueuedJob(
        id=job.id,
        project=job.project,
        key=job.key,
        tier=job.tier,
        submitted_at=job.started_at,
        gpus=max(1, len(job.device_ids) // hosts),
        expected_seconds=3600.0,
        preemptible=job.preemptible,
    )


def after_preemption(state: State, decision: Plan, claimant: QueuedJob) -> State | None:
    """The world once the claimant runs on what its victims left and the victims are queued again and refunded."""
    queue, running, devices, shares = state
    victims = {p.victim_id for p in decision.preemptions if p.for_job_id == claimant.id}
    pool = {device.id: device for device in devices}
    freed = [replace(device, free_bytes=device.total_bytes - device.foreign_bytes) for device in devices]
    left = [job for job in running if job.id not in victims]
    placed = decide(([claimant], left, freed, [])).assignments
    if not placed:
        return None
    back = [requeued(job, pool=pool) for job in running if job.id in victims]
    runs = RunningJob(
        id=claimant.id,
        project=claimant.project,
        key=claimant.key,
        tier=claimant.tier,
        priority=claimant.priority,
        device_ids=placed[0].device_ids,
        started_at=NOON,
        preemptible=True,
    )
    paid = Counter({claimant.project: charge(claimant, policy=POLICY)})
    for job in back:
        paid[job.project] -= charge(job, policy=POLICY)
    settled = [replace(share, usage=max(0.0, share.usage + paid[share.project])) for share in shares]
    waiting = [job for job in queue if job.id != claimant.id]
    return [*waiting, *back], [*left, runs], freed, settled


@settings(max_examples=250)
@given(states())
def test_a_stopped_job_never_stops_the_job_it_was_stopped_for(state: State) -> None:
    decision = decide(state)

    for job in [job for job in state[0] if job.id in {p.for_job_id for p in decision.preemptions}]:
        world = after_preemption(state, decision, job)
        if world is not None:
            victims = {p.victim_id for p in decision.preemptions if p.for_job_id == job.id}
            again = decide(world, now=NOON + POLICY.min_runtime)
            assert not [p for p in again.preemptions if p.victim_id == job.id and p.for_job_id in victims]


# ---- a whole random load: nobody is forgotten

LONGEST = 3600.0
PATIENCE = Policy(max_wait=timedelta(hours=3))


def longest_waits(seed: int, policy: Policy) -> dict[str, float]:
    """Seconds that each job of the quiet projects waited, beside a project that always has more interactive jobs.

    Four devices. `loud` keeps eight interactive jobs queued and weighs ten times as much; `quiet` and `calm` bring a
    best-effort job or a gang of two every now and then, fewer than their part of the pool could hold.
    """
    rng, now, ends = random.Random(seed), 0.0, list[tuple[float, str]]()
    devices = [Device(id=f"d{n}", host="h", total_bytes=1, free_bytes=1) for n in range(4)]
    shares = [Share("loud", weight=10), Share("quiet", usage=1e6), Share("calm", usage=1e6)]
    queue, running, waits = dict[str, QueuedJob](), dict[str, RunningJob](), dict[str, float]()

    def submit(job_id: str, project: str, **changes: object) -> None:
        when = NOON + timedelta(seconds=now)
        job = QueuedJob(
            id=job_id, project=project, key="k", submitted_at=when, max_runtime_seconds=LONGEST, preemptible=False
        )
        queue[job_id] = replace(job, **changes)  # type: ignore[arg-type]

    for step in range(150):
        for _ in range(8 - sum(job.project == "loud" for job in queue.values())):
            submit(f"loud-{step}-{len(queue)}", "loud", tier="interactive")
        if step % 40 == 0:
            submit(f"quiet-{step}", "quiet", tier="best_effort")
            submit(f"calm-{step}", "calm", gpus=rng.choice((1, 2)))
        moment = NOON + timedelta(seconds=now)
        for assignment in plan(
            queue.values(), running.values(), devices, shares, policy=policy, now=moment
        ).assignments:
            job = queue.pop(assignment.job_id)
            if job.project != "loud":
                waits[job.id] = (moment - job.submitted_at).total_seconds()
            running[job.id] = RunningJob(
                id=job.id,
                project=job.project,
                key="k",
                tier=job.tier,
                priority=0,
                device_ids=assignment.device_ids,
                started_at=moment,
                max_runtime_seconds=LONGEST,
                preemptible=False,
            )
            heapq.heappush(ends, (now + rng.uniform(60, LONGEST), job.id))
        now, ended = heapq.heappop(ends)
        del running[ended]
    for job in queue.values():
        if job.project != "loud":
            waits[job.id] = (NOON + timedelta(seconds=now) - job.submitted_at).total_seconds()
    return waits


@settings(max_examples=12)
@given(st.integers(0, 10_000))
def test_no_job_waits_longer_than_max_wait_and_the_longest_running_job(seed: int) -> None:
    waits = longest_waits(seed, PATIENCE)

    assert len(waits) == 8
    assert max(waits.values()) <= PATIENCE.max_wait.total_seconds() + LONGEST


def test_without_aging_the_same_load_starves_the_quiet_projects() -> None:
    waits = longest_waits(1, Policy(max_wait=timedelta(days=365)))

    assert max(waits.values()) > PATIENCE.max_wait.total_seconds() + LONGEST
