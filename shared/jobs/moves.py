"""Every move of a job, and the only writer of its status: `UPDATE … WHERE id AND status AND fence`, rowcount checked.

Zero rows is a normal answer: somebody else owns the job now, and the caller drops what it has.
"""

from shared.jobs.claims import claim_membership, claim_training, claim_validation
from shared.jobs.cluster_attempts import submit, take_over
from shared.jobs.endings import (
    confirm_cancelled,
    confirm_paused,
    fail,
    fail_waiting,
    give_back,
    succeed,
    validated,
)
from shared.jobs.progress import heartbeat, read_orders, record, record_checkpoint, set_phase
from shared.jobs.reaping import never_began, reap
from shared.jobs.requests import (
    cancel_all_waiting,
    cancel_waiting,
    request_cancel,
    request_cancel_of_running,
    request_pause,
    resume,
)
from shared.jobs.settled_anew import settle_anew

__all__ = [
    "cancel_all_waiting",
    "cancel_waiting",
    "claim_membership",
    "claim_training",
    "claim_validation",
    "confirm_cancelled",
    "confirm_paused",
    "fail",
    "fail_waiting",
    "give_back",
    "heartbeat",
    "never_began",
    "read_orders",
    "reap",
    "record",
    "record_checkpoint",
    "request_cancel",
    "request_cancel_of_running",
    "request_pause",
    "resume",
    "set_phase",
    "settle_anew",
    "submit",
    "succeed",
    "take_over",
    "validated",
]
