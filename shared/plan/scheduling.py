"""Which queued job starts where, who is stopped for it, and why the others wait: `plan()`.

Pure: no clock, no I/O, no database; the answer depends on the arguments alone, not on their order. The policy is
explained with a worked example in docs/scheduling.md. Anchors: Slurm's decayed fair share (half-life 7 d) and EASY
backfill, Kueue's admission fair sharing (entry penalty) and loop-free preemption. The parts: `fairshare` (the order),
`capacity` (what fits where), `preemption` (who may be stopped), `verdicts` (why the others wait).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf
from typing import NamedTuple

from shared.plan import reasons
from shared.plan.capacity import Demand, Device, HostMap
from shared.plan.device_times import Fetching, Occupancy
from shared.plan.fairshare import Policy, ProjectQueue, QueuedJob, Share, charge, decayed, lanes, turns
from shared.plan.preemption import (
    BEST_EFFORT,
    RANK,
    Claimant,
    Ground,
    RunningJob,
    Tier,
    Victim,
    ground,
    may_reclaim,
    preference,
    smallest_set,
    stoppable,
    within,
)
from shared.plan.verdicts import BlockedBy, Reason, Verdict, Verdicts, Waiting

__all__ = [
    "Assignment",
    "BlockedBy",
    "Device",
    "Fetching",
    "Ground",
    "Plan",
    "Policy",
    "Preemption",
    "QueuedJob",
    "RunningJob",
    "Share",
    "Tier",
    "Verdict",
    "charge",
    "decayed",
    "plan",
]


@dataclass(frozen=True, slots=True)
class Assignment:
    job_id: str
    device_ids: tuple[str, ...]
    backfill: bool = False  # on devices reserved for another job: store it, it comes back as RunningJob.backfill


@dataclass(frozen=True, slots=True)
class Preemption:
    victim_id: str
    for_job_id: str
    ground: Ground
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    assignments: tuple[Assignment, ...]
    preemptions: tuple[Preemption, ...]
    verdicts: Verdicts  # in the effective order; one per queued job that is not assigned


def plan(
    queue: Iterable[QueuedJob],
    running: Iterable[RunningJob],
    devices: Iterable[Device],
    shares: Iterable[Share],
    *,
    policy: Policy,
    now: datetime,
    fetches: Mapping[str, Fetching] | None = None,
) -> Plan:
    """Decide one pass over one pool. Ids are unique; a project without a share has weight 1 and no usage.

    `fetches`: base model -> how far its fetch is; only told, never decided by.
    """
    moment = now.timestamp()
    leases = list(running)
    occupancy = Occupancy(devices, leases, policy=policy, now=moment, fetches=fetches)
    queues = lanes(
        queue,
        leases,
        shares,
        devices=occupancy.usable_count,
        aged_before=moment - policy.max_wait.total_seconds(),
    )
    decision = _Pass(queues, occupancy, policy=policy, now=moment)
    for job, lane, aged in turns(queues):
        decision.consider(job, lane, aged=aged)
    return decision.result()


class _Reservation(NamedTuple):
    """The devices that are kept for the first job that has to wait, and when they are all free at the latest."""

    job_id: str
    claimant: Claimant
    device_ids: frozenset[str]
    at: float  # POSIX seconds; inf: nobody knows
    aged: bool
    notice: Reason  # what the jobs are told that would fit if it were not for the reservation


class _Kind:
    """Jobs that ask for the same, whatever their bytes: asked about once, and not by each of many jobs anew."""

    __slots__ = ("every", "most", "needs", "shape", "soon")

    def __init__(self, job: QueuedJob, *, obtainable: HostMap, every: HostMap, soon: HostMap) -> None:
        self.needs, self.shape = job.needs, (job.gpus, job.nodes)
        self.most = obtainable.able(self.needs).widest(*self.shape)  # bytes on each device, once every job has ended
        self.every, self.soon = every.able(self.needs), soon.able(self.needs)


class _Pass:
    """The state of one pass: what is free, what is promised, what was decided."""

    def __init__(self, queues: Mapping[str, ProjectQueue], occupancy: Occupancy, *, policy: Policy, now: float) -> None:
        self.lanes, self.occupancy, self.policy, self.now = queues, occupancy, policy, now
        self.open = occupancy.free()  # free for anybody
        self.every = occupancy.free()  # and what is reserved, for jobs that end before the reservation
        self.soon = occupancy.free(leaving=True)  # free, or about to be by a preemption under way
        self.victims = self._victims()
        self.stoppable = {victim.job.id: victim for victim in self.victims}
        self.hopeless = dict[tuple[object, ...], int]()  # claim -> smallest need that no preemption can serve
        self.kinds = dict[tuple[object, ...], _Kind]()
        self.reserved: _Reservation | None = None
        self.assignments = list[Assignment]()
        self.preemptions = list[Preemption]()
        self.waiting = list[Waiting]()

    def result(self) -> Plan:
        verdicts = Verdicts(self.waiting, self.occupancy.outlook(), policy=self.policy)
        return Plan(tuple(self.assignments), tuple(self.preemptions), verdicts)

    def _victims(self) -> list[Victim]:
        """The running jobs that could be stopped, as their projects stand before this pass."""
        shortest = self.policy.min_runtime.total_seconds()
        victims = list[Victim]()
        for lane in self.lanes.values():
            staying = [job for job in lane.running if not job.preempt_requested]
            covered = within((job for job in staying if job.firm), lane.share.guarantee)
            fair = within(staying, lane.part, always_one=True)
            for job in staying:
                if stoppable(job, now=self.now, min_runtime=shortest):
                    victims.append(
                        self._victim(job, lane, borrowed=job.id not in covered, over_part=job.id not in fair)
                    )
        return sorted(victims, key=preference)

    def _victim(self, job: RunningJob, lane: ProjectQueue, *, borrowed: bool, over_part: bool) -> Victim:
        return Victim(
            job=job,
            rank=RANK[job.tier],
            share_before=lane.share.usage / lane.share.weight,
            borrowed=borrowed,
            over_part=over_part,
            devices=self.occupancy.obtainable_of(job),
        )

    # One job's turn

    def consider(self, job: QueuedJob, lane: ProjectQueue, *, aged: bool) -> None:
        """Start the job, or record why it waits."""
        kind, cost = self._kind(job), charge(job, policy=self.policy)
        aside = self._aside(job, lane, kind, cost)
        if aside is not None:
            return self._wait(job, aside, in_line=False)
        guaranteed = lane.guarantees(job)
        lane.take_turn(job, cost)
        if self._out_of_reach(job, kind):
            return self._wait(job, reasons.BUSY, in_line=True)
        demand = self._demand(job, kind)
        if self._start(job, lane, demand, cost):
            return None
        claimant = Claimant(
            project=job.project,
            rank=RANK[job.tier],
            share_after=lane.usage / lane.share.weight,
            guaranteed=guaranteed,
            below_part=not lane.taken or lane.taken + job.devices <= lane.part,
            head=self.reserved is None,
        )
        reason = self._claim(job, lane, demand, cost, claimant) or self._line_up(job, demand, claimant, aged=aged)
        return self._wait(job, reason, in_line=True)

    def _kind(self, job: QueuedJob) -> _Kind:
        key = (job.gpus, job.nodes, job.base_model, job.needs_gpu, job.needs_bfloat16, job.needs_capability)
        kind = self.kinds.get(key)
        if kind is None:
            kind = _Kind(job, obtainable=self.occupancy.obtainable, every=self.every, soon=self.soon)
            self.kinds[key] = kind
        return kind

    def _demand(self, job: QueuedJob, kind: _Kind) -> Demand:
        return Demand(job.gpus, job.nodes, job.bytes_per_device, kind.needs)

    def _out_of_reach(self, job: QueuedJob, kind: _Kind) -> bool:
        """Whether there is nothing left for the job to start on, to claim, to free or to reserve: most jobs, mostly."""
        if self.reserved is None or (self.victims and len(self.preemptions) < self.policy.preemptions_per_pass):
            return False
        need = job.bytes_per_device
        return not (kind.soon.offers(kind.shape, need) or kind.every.offers(kind.shape, need))

    def _wait(self, job: QueuedJob, reason: Reason, *, in_line: bool) -> None:
        self.waiting.append((job, reason, in_line))

    def _aside(self, job: QueuedJob, lane: ProjectQueue, kind: _Kind, cost: float) -> Reason | None:
        """Why the job cannot start even on free devices, or None. Such a job reserves nothing and costs nothing."""
        stopped = self._stopped(job, lane)
        if stopped is None and job.bytes_per_device > kind.most:
            stopped = self.occupancy.obstacle(self._demand(job, kind))
        return stopped or self._over_limit(job, lane, cost)

    def _stopped(self, job: QueuedJob, lane: ProjectQueue) -> Reason | None:
        if self.policy.held:
            return reasons.HELD_POOL
        if lane.share.held:
            return reasons.HELD_PROJECT
        if job.held:
            return reasons.HELD_JOB
        if job.not_before is not None and job.not_before.timestamp() > self.now:
            return reasons.BACKOFF
        return None

    def _over_limit(self, job: QueuedJob, lane: ProjectQueue, cost: float) -> Reason | None:
        cap, key_cap = lane.share.max_running, lane.share.key_max_running.get(job.key)
        held = lane.by_key[job.key] if key_cap is not None else 0
        if lane.budget is not None and cost > lane.budget:
            return Reason("BUDGET", reasons.BUDGET, (cost, job.project, max(0.0, lane.budget)))
        if cap is not None and lane.taken + job.devices > cap:
            return Reason("QUOTA_PROJECT", reasons.QUOTA, (job.devices, f"project {job.project}", lane.taken, cap))
        if key_cap is not None and held + job.devices > key_cap:
            return Reason("QUOTA_KEY", reasons.QUOTA, (job.devices, f"key {job.key}", held, key_cap))
        return None

    # Devices for a job

    def _start(self, job: QueuedJob, lane: ProjectQueue, demand: Demand, cost: float) -> bool:
        if self.open.fits(demand):
            chosen = self.open.choose(demand)
        elif self.reserved is not None and self.every.fits(demand) and self._may_backfill(job, lane, cost):
            chosen = self.every.choose(demand)
        else:
            return False
        kept = self.reserved.device_ids if self.reserved is not None else frozenset[str]()
        ids = tuple(device.id for device in chosen)
        self.assignments.append(Assignment(job.id, ids, backfill=not kept.isdisjoint(ids)))
        for device in chosen:
            self.occupancy.occupy(device, job)
            self._take(device)
        lane.take_devices(job, cost)
        return True

    def _take(self, device: Device) -> None:
        for stock in (self.open, self.every, self.soon):
            stock.remove(device)

    def _may_backfill(self, job: QueuedJob, lane: ProjectQueue, cost: float) -> bool:
        """Only jobs that end before the reservation, or that its holder (unless it aged) may stop."""
        assert self.reserved is not None
        if job.max_runtime_seconds is not None and self.now + job.max_runtime_seconds <= self.reserved.at:
            return True
        if self.reserved.aged or not (job.preemptible or RANK[job.tier] == BEST_EFFORT):
            return False
        return may_reclaim(self.reserved.claimant, self._as_victim(job, lane, cost))

    def _as_victim(self, job: QueuedJob, lane: ProjectQueue, cost: float) -> Victim:
        """The job as it would stand if it were backfilled now."""
        started = RunningJob(
            id=job.id,
            project=job.project,
            key=job.key,
            tier=job.tier,
            priority=job.priority,
            device_ids=(),
            started_at=job.submitted_at,
            backfill=True,
        )
        borrowed = RANK[job.tier] == BEST_EFFORT or lane.firm > lane.share.guarantee
        share = (lane.spent + cost) / lane.share.weight
        return Victim(started, RANK[job.tier], share, borrowed=borrowed, over_part=True, devices=())

    def _claim(
        self, job: QueuedJob, lane: ProjectQueue, demand: Demand, cost: float, claimant: Claimant
    ) -> Reason | None:
        """Promise the job devices that are about to be free, stopping others where it may; None if it may not."""
        if not self.soon.fits(demand):
            stopped = self._stop(job, demand, claimant)
            if not stopped:
                return None
        chosen = self.soon.choose(demand)
        for device in chosen:
            self.occupancy.promise(device)
            self._take(device)
        lane.take_devices(job, cost)
        return Reason("NO_FREE_DEVICE", reasons.PROMISED, (", ".join(device.id for device in chosen),))

    def _stop(self, job: QueuedJob, demand: Demand, claimant: Claimant) -> bool:
        if len(self.preemptions) >= self.policy.preemptions_per_pass or not self.victims:
            return False
        claim = (
            claimant.project,
            claimant.rank,
            demand.gpus,
            demand.nodes,
            demand.needs,
            claimant.guaranteed,
            claimant.head,
        )
        if demand.bytes_needed >= self.hopeless.get(claim, demand.bytes_needed + 1):
            return False
        kept = self.reserved.device_ids if self.reserved is not None else frozenset[str]()
        grounds = {
            victim.job.id: why
            for victim in self.victims
            if kept.isdisjoint(victim.job.device_ids) and (why := ground(claimant, victim)) is not None
        }
        candidates = [victim for victim in self.victims if victim.job.id in grounds]
        chosen = smallest_set(candidates, demand, self.soon)
        if not chosen:
            self.hopeless[claim] = demand.bytes_needed
            return False
        for victim in chosen:
            self._request(victim, job, grounds[victim.job.id])
        return True

    def _request(self, victim: Victim, job: QueuedJob, why: Ground) -> None:
        reason = reasons.GROUNDS[why].format(job.project, victim.job.project, job.id)
        self.preemptions.append(Preemption(victim.job.id, job.id, why, reason))
        self.victims.remove(victim)
        for device in victim.devices:
            self.occupancy.vacate(device)
            self.soon.add(device, self.occupancy.room(device))

    # Waiting for devices

    def _line_up(self, job: QueuedJob, demand: Demand, claimant: Claimant, *, aged: bool) -> Reason:
        if self.reserved is None:
            return self._reserve(job, demand, claimant, aged=aged)
        return self.reserved.notice if self.every.fits(demand) else reasons.BUSY

    def _reserve(self, job: QueuedJob, demand: Demand, claimant: Claimant, *, aged: bool) -> Reason:
        """Keep the devices that are free first, on the hosts where all that the job needs are free first."""
        teams = self.occupancy.obtainable.teams(demand)
        offers = [sorted(self._wait_on(host, demand, claimant) for host in team)[: demand.nodes] for team in teams]
        options = min(offers, key=lambda offer: (offer[-1], offer))
        ids = frozenset(device_id for option in options for device_id in option[-1])
        at = max(option[0] for option in options)
        notice = Reason("RESERVED_FOR", reasons.RESERVED, (job.id, _clock(at)))
        self.reserved = _Reservation(job.id, claimant, ids, at, aged, notice)
        for device_id in ids:
            self.open.remove(self.occupancy.devices[device_id])
            self.soon.remove(self.occupancy.devices[device_id])
        return Reason("NO_FREE_DEVICE", reasons.FIRST, (", ".join(sorted(ids)), _clock(at)))

    def _wait_on(self, host: str, demand: Demand, claimant: Claimant) -> tuple[float, int, str, tuple[str, ...]]:
        """(all free at, how many of them are busy, host, devices) for one host's part of the demand."""
        fitting = self.occupancy.obtainable.devices(host, demand)
        ready = sorted((self._ready(device, claimant), device not in self.every, device.id) for device in fitting)
        chosen = ready[: demand.gpus]
        return chosen[-1][0], sum(busy for _, busy, _ in chosen), host, tuple(device_id for *_, device_id in chosen)

    def _ready(self, device: Device, claimant: Claimant) -> float:
        """When the claimant has the device at the latest: its job's end, sooner if that job was backfilled."""
        end = self.occupancy.ends[device.id]
        job = self.occupancy.running.get(device.id)
        if job is None or not job.backfill or end == self.now:
            return end
        victim = self.stoppable.get(job.id)
        if victim is None or not may_reclaim(claimant, victim):
            return end
        return min(end, self.now + self.policy.preempt_grace.total_seconds())


def _clock(moment: float) -> str:
    return "an unknown time" if moment == inf else f"{datetime.fromtimestamp(moment, tz=UTC):%Y-%m-%d %H:%M} UTC"
