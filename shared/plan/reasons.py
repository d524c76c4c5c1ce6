"""The sentences of the plan: why a job waits, and on what ground another is stopped for it. Pure."""

from __future__ import annotations

from typing import Final

from shared.plan.preemption import Ground
from shared.plan.verdicts import Reason

GROUNDS: Final[dict[Ground, str]] = {
    "tier": "a job of a higher tier waits",
    "guarantee": "project {0} reclaims devices within its guarantee",
    "share": "project {0} is below its share and project {1} is above its own",
    "reservation": "the job ran on devices that are reserved for {2}",
}

BUDGET: Final = (
    "the job is charged {:,.0f} device-seconds and project {} has {:,.0f} left of its budget; "
    "unblocked by a larger budget or the next period"
)
QUOTA: Final = (
    "the job takes {} devices; {} holds {} of the {} that it may hold; "
    "unblocked when one of its jobs ends or by a larger cap"
)
PROMISED: Final = "{} is promised to this job and is being freed by a preemption that is under way"
FIRST: Final = "first in line; waits for {}, free at the latest at {}"
RESERVED: Final = (
    "free devices are reserved for {} until {}; unblocked then, or at once for a job whose max_runtime ends before"
)
BUSY: Final = Reason(
    "NO_FREE_DEVICE",
    "needs {job.gpus} devices on each of {job.nodes} hosts, with {gib:.1f} GiB each (safety included); all that fit "
    "are busy or promised; unblocked when the jobs ahead have had theirs",
)
HELD_POOL: Final = Reason("HELD", "the pool is held; released by an administrator")
HELD_PROJECT: Final = Reason("HELD", "project {job.project} is held; released by an administrator")
HELD_JOB: Final = Reason("HELD", "the job is held; release it to queue it again")
BACKOFF: Final = Reason(
    "BACKOFF_UNTIL", "the last attempt failed; tried again after {job.not_before:%Y-%m-%d %H:%M:%S %Z}"
)
