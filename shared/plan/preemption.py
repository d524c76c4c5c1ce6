"""Who may be stopped for whom, and the smallest set of victims. Pure: no clock, no I/O.

The rules are loop-free (docs/scheduling.md has the argument): if A may stop B, then B, queued again and charged
again, may not stop A. Anchors: Kueue's LessThanInitialShare and its minimisation in reverse, Determined's rule
that what is backfilled must be preemptible.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal, NamedTuple

from shared.plan.capacity import Demand, Device, HostMap

Tier = Literal["interactive", "normal", "best_effort"]
Ground = Literal["tier", "guarantee", "share", "reservation"]
RANK: Final[dict[Tier, int]] = {"interactive": 0, "normal": 1, "best_effort": 2}
BEST_EFFORT: Final = RANK["best_effort"]


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A job that holds devices."""

    id: str
    project: str
    key: str
    tier: Tier
    priority: int
    device_ids: tuple[str, ...]
    started_at: datetime
    max_runtime_seconds: float | None = None
    expected_seconds_left: float | None = None
    preemptible: bool = True
    preempt_requested: bool = False
    backfill: bool = False  # started on devices reserved for another job (`Assignment.backfill`)
    companions: tuple[str, ...] = ()  # the jobs that share its device; whoever stops one stops all

    @property
    def firm(self) -> bool:
        """Whether it counts against its project's guarantee; best effort always runs on borrowed devices."""
        return self.tier != "best_effort"


class Claimant(NamedTuple):
    """A queued job that finds no free devices."""

    project: str
    rank: int
    share_after: float  # decayed device-seconds / weight, its own charge included
    guaranteed: bool  # its devices are within its project's guarantee
    below_part: bool  # its project would hold no more than its part of the pool, or this job alone
    head: bool  # the first job in the effective order that has to wait


@dataclass(frozen=True, slots=True)
class Victim:
    """A running job that could be stopped, with its project's standing before."""

    job: RunningJob
    rank: int
    share_before: float
    borrowed: bool  # outside its project's guarantee
    over_part: bool  # outside its project's part of the pool, and not its oldest job
    devices: tuple[Device, ...]


def ground(claimant: Claimant, victim: Victim) -> Ground | None:
    """Why the claimant may stop the victim, or None if it may not."""
    if claimant.project == victim.job.project:
        return _ground_at_home(claimant, victim)
    if not victim.borrowed:
        return None
    if claimant.guaranteed:
        return "guarantee"
    if claimant.rank != victim.rank:
        return "tier" if claimant.rank < victim.rank else None
    if claimant.share_after < victim.share_before and claimant.below_part and victim.over_part:
        return "share"
    return "reservation" if may_reclaim(claimant, victim) else None


def _ground_at_home(claimant: Claimant, victim: Victim) -> Ground | None:
    if claimant.rank < victim.rank:
        return "tier"
    return "reservation" if may_reclaim(claimant, victim) else None


def may_reclaim(claimant: Claimant, victim: Victim) -> bool:
    """Whether a reservation's holder gets its devices back from a job that was backfilled on them."""
    if not (claimant.head and victim.job.backfill):
        return False
    if claimant.project == victim.job.project:
        return claimant.rank <= victim.rank
    equal_but_poorer = claimant.rank == victim.rank and claimant.below_part
    return victim.borrowed and (claimant.rank < victim.rank or equal_but_poorer)


def within(jobs: Iterable[RunningJob], limit: float, *, always_one: bool = False) -> frozenset[str]:
    """The jobs that a limit of devices covers, oldest start first; one that does not fit leaves room for the next.

    With `always_one` the oldest job is covered whatever its size.
    """
    covered, used = set[str](), 0
    for job in sorted(jobs, key=lambda job: (job.started_at, job.id)):
        if used + len(job.device_ids) <= limit or (always_one and not covered):
            used += len(job.device_ids)
            covered.add(job.id)
    return frozenset(covered)


def stoppable(job: RunningJob, *, now: float, min_runtime: float) -> bool:
    """Whether a running job can be a victim at all; `now` and `min_runtime` are seconds."""
    ran = now - job.started_at.timestamp()
    return (job.preemptible or not job.firm) and not job.preempt_requested and ran >= min_runtime


def preference(victim: Victim) -> tuple[bool, int, float, float, str]:
    """The right victim first: borrowed or over its part, lowest tier, largest share, newest start."""
    settled = not victim.borrowed or not victim.over_part
    return (settled, -victim.rank, -victim.share_before, -victim.job.started_at.timestamp(), victim.job.id)


def smallest_set(candidates: Sequence[Victim], demand: Demand, soon: HostMap) -> tuple[Victim, ...]:
    """The victims to stop so that `demand` fits beside the devices in `soon`; empty if nothing helps.

    Adds candidates in order until the demand fits, then gives back in reverse each one that it can do without,
    so that no victim of the answer is superfluous.
    """
    room, stopped = soon.copy(), list[Victim]()
    hosts = set(room.hosts_for(demand))
    for victim in candidates:
        _free(victim, room)
        stopped.append(victim)
        hosts.update(device.host for device in victim.devices if room.serves(device.host, demand))
        if len(hosts) >= demand.nodes and (demand.nodes == 1 or room.teams(demand)):
            return _minimised(stopped, demand, room)
    return ()


def _free(victim: Victim, room: HostMap) -> None:
    for device in victim.devices:
        room.add(device, device.total_bytes - device.foreign_bytes)


def _minimised(stopped: list[Victim], demand: Demand, room: HostMap) -> tuple[Victim, ...]:
    kept = list[Victim]()
    for victim in reversed(stopped):
        for device in victim.devices:
            room.remove(device)
        if not room.teams(demand):
            _free(victim, room)
            kept.append(victim)
    return tuple(reversed(kept))
