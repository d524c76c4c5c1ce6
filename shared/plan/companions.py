"""Which waiting jobs come along with a job that starts: on its device, on one base in memory. Pure: no clock, no I/O.

`plan()` decides as if nobody trained together. Then, of the jobs that it left waiting, some share a device that it gave
away. Nobody is overtaken: the walk through the line ends at the first job that could use the device, and cannot come.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shared.plan import reasons
from shared.plan.capacity import Device
from shared.plan.fairshare import Policy, QueuedJob, Share, charge
from shared.plan.scheduling import Assignment, Plan
from shared.plan.verdicts import Turn


class CommonGround(NamedTuple):
    """What a job shares with others on its device."""

    words: str  # equal for jobs that may share: base, revision, storage, quantization, dtype
    base_bytes: int  # of its memory, held once for all


@dataclass(frozen=True, slots=True)
class Company:
    """The rules of jobs that train together."""

    most: int  # jobs on a device
    longest_seconds: float  # of each job's forecast
    across_projects: bool = False


def companions(
    made: Plan,
    start: Assignment,
    *,
    queue: Sequence[QueuedJob],
    devices: Sequence[Device],
    shares: Sequence[Share],
    grounds: Mapping[str, CommonGround],
    policy: Policy,
    company: Company,
) -> tuple[str, ...]:
    """The jobs that share the device of `start`, an assignment of `made`, in the effective order.

    `queue`, `devices`, `shares` and `policy` are what the plan was made of; `grounds` are those of jobs that may share.
    """
    jobs = {job.id: job for job in queue}
    leading, ground = jobs[start.job_id], grounds.get(start.job_id)
    device = next((device for device in devices if device.id == start.device_ids[0]), None)
    alone = start.backfill or len(start.device_ids) > 1 or device is None or device.of_cluster
    if alone or ground is None or device is None or not _small(leading, company):
        return ()
    spent = defaultdict[str, float](float)
    for assignment in made.assignments:
        spent[jobs[assignment.job_id].project] += charge(jobs[assignment.job_id], policy=policy)
    budgets = {share.project: share.budget_left_seconds for share in shares}
    room = device.free_bytes - leading.bytes_per_device
    chosen: list[str] = []
    for turn in made.verdicts.turns():
        if len(chosen) + 1 >= company.most:
            break
        if not turn.in_line or turn.reason.template == reasons.PROMISED:
            continue  # it waits for something else than a device, or has one coming
        job, its_ground = turn.job, grounds.get(turn.job.id)
        budget, cost = budgets.get(job.project), charge(job, policy=policy)
        joins = (
            its_ground is not None
            and its_ground.words == ground.words
            and _alike(job, leading, company)
            and _own_bytes(job, its_ground) <= room
            and (budget is None or spent[job.project] + cost <= budget)
        )
        if joins and its_ground is not None:
            chosen.append(job.id)
            room -= _own_bytes(job, its_ground)
            spent[job.project] += cost
        elif _could_use(device, turn):
            break
    return tuple(chosen)


def _small(job: QueuedJob, company: Company) -> bool:
    """Whether its forecast is short. A limit of its time is one of the clock's, which runs while others have a turn."""
    known = job.expected_seconds is not None and job.max_runtime_seconds is None
    return known and job.devices == 1 and (job.expected_seconds or 0.0) <= company.longest_seconds


def _alike(job: QueuedJob, leading: QueuedJob, company: Company) -> bool:
    """Whether the two may be stopped for the same, and may see each other's process."""
    return (
        _small(job, company)
        and (job.tier, job.preemptible) == (leading.tier, leading.preemptible)
        and (company.across_projects or job.project == leading.project)
    )


def _own_bytes(job: QueuedJob, ground: CommonGround) -> int:
    return max(0, job.bytes_per_device - ground.base_bytes)


def _could_use(device: Device, turn: Turn) -> bool:
    """Whether the job could start on the device once it is free."""
    return turn.job.needs.met_by(device) and turn.job.bytes_per_device <= device.free_bytes
