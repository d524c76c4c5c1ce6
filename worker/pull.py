"""What a bell makes a worker do: take work of a lane until there is none. Extra bells find nothing and cost a query.

`python -m worker.pull LANE` does the same without a bell, for the time when the broker is away.
"""

from __future__ import annotations

import gc
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

if __name__ == "__main__":
    # What imports make lives to the end: to look through it meanwhile is a quarter of the start.
    gc.disable()

import structlog
from sqlalchemy.orm import Session

from shared import failpoints
from shared import log as logs
from shared.jobs import moves
from shared.lease.values import Claim
from shared.operating.secrecy import hide_secrets
from shared.plan.companions import Company
from shared.settings import Settings
from shared.store.bell import call, ring
from shared.store.lifecycle import Lane
from worker.attempt import seat
from worker.attempt.group import run_group
from worker.attempt.log_upload import send_left
from worker.attempt.member import take_part
from worker.attempt.seat import DeviceSeat
from worker.attempt.supervisor import run_attempt
from worker.chores import evaluation_seat
from worker.chores.evaluating import evaluate_next
from worker.chores.preparing import prepare_missed
from worker.chores.table import do_next
from worker.host.flags import SharedFlags
from worker.host.host import AWAY, Host, open_host
from worker.program import processes

log = structlog.get_logger()


def training(host: Host) -> None:
    """Serve until nothing is for this worker; then stay, where a device has nobody who waits for its next job."""
    host.flags.ring_seats("training")
    _serve(host)
    with seat.taken(host) as ours:
        if ours is None:
            return
        while ours.wait():
            _serve(host, ours)
    _serve(host)  # what a sibling has left to us meanwhile


def _serve(host: Host, ours: DeviceSeat | None = None) -> None:
    """Take part where we are called, claim and supervise jobs, one after the other, until none is for this process."""
    while True:
        host.flags.pulled("training", at=time.monotonic())
        # Before anything of our own, and while draining too: the leader must hear it, its devices idle meanwhile.
        part = host.claim(partial(moves.claim_membership, worker_id=host.worker.id))
        if part is not None:
            ring("training", host.settings)  # whoever else may take what this bell was for
            if ours is not None:
                ours.rise("its worker takes part in a job on several hosts")
            take_part(host, part)
            continue
        if host.flags.draining:
            return
        claim = host.claim(partial(_claim, host, ours))
        if claim is None:
            return
        failpoints.reach("after_claim", host.settings)
        if len(host.devices) > 1:
            ring("training", host.settings)  # a sibling may fill the next device
        for member in claim.members:
            call(member.worker_id, host.settings)
        spare = None if ours is None else ours.give(claim)
        if claim.companions:
            run_group(host, claim)
        else:
            run_attempt(host, claim, spare=spare)


def _claim(host: Host, ours: DeviceSeat | None, session: Session, *, passed_over: Collection[str]) -> Claim | None:
    claim = moves.claim_training(
        session,
        worker_id=host.worker.id,
        pool_name=host.settings.pool,
        lease_seconds=host.settings.lease_seconds,
        passed_over=passed_over,
        left=seat.left_to_others(host, ours),
        company=_company(host.settings),
    )
    if claim is not None:
        failpoints.reach("claim_before_commit", host.settings)
    return claim


def _company(settings: Settings) -> Company | None:
    if settings.cotraining == "off":
        return None
    return Company(
        most=settings.cotraining_jobs,
        longest_seconds=settings.cotraining_seconds,
        across_projects=settings.cotraining == "any",
    )


def cpu(host: Host) -> None:
    """Do chores until none waits that may begin; then stay, where nobody waits for the next evaluation."""
    host.flags.ring_seats("cpu")
    _do_chores(host)
    with evaluation_seat.taken(host) as ours:
        if ours is None:
            return
        while ours.wait():
            host.flags.pulled("cpu", at=time.monotonic())
            while not host.flags.draining and evaluate_next(host, ours):
                ring("cpu", host.settings)  # long work whose turn it is now, which is not done here
    _do_chores(host)  # what a sibling has left to us meanwhile


def _do_chores(host: Host) -> None:
    """The short ones first, except for evaluations while a sibling waits for the next."""
    while not host.flags.draining:
        host.flags.pulled("cpu", at=time.monotonic())
        left = ("evaluation",) if host.flags.is_kept(host.flags.evaluations) else ()
        if not do_next(host, left=left):
            break
        host.flags.ring_seats("cpu")  # an evaluation may have its turn now
    prepare_missed(host)
    send_left(host)  # of attempts whose supervisor died, or could not reach the store


PULLS: Final[dict[Lane, Callable[[Host], None]]] = {"training": training, "cpu": cpu}


def pull(lane: Lane, host: Host) -> None:
    """Serve a bell. A database that is away is no error: the sweep rings again.

    Nothing is taken before the worker has registered, for that would end the lease again; it rings itself afterwards.
    """
    if not host.flags.registered:
        return
    with _draining_on_sigterm(host.flags), host.flags.at_work(lane, child=processes.child_number()):
        try:
            PULLS[lane](host)
        except AWAY as error:
            log.warning("pull.unanswered", lane=lane, error=str(error)[:200])


@contextmanager
def _draining_on_sigterm(flags: SharedFlags) -> Iterator[None]:
    """While it works, this process drains on a SIGTERM (one to the whole group reaches it too) instead of dying."""
    before = signal.signal(signal.SIGTERM, lambda _number, _frame: flags.drain())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(lane: Lane) -> None:
    """Serve one lane without a bell; ends when there is nothing to do, or when its parent dies."""
    hide_secrets()
    processes.die_with_parent(int(sys.argv[2]))
    processes.adopt_strays()
    settings = Settings()
    logs.configure(settings)
    flags = SharedFlags()
    flags.register()  # who sends a deputy has done so
    pull(lane, open_host(settings, flags=flags))


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    main("cpu" if sys.argv[1] == "cpu" else "training")
