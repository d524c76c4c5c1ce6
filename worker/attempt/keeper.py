"""Keeps an attempt's lease alive from a thread of its own and listens for orders, whatever the attempt is busy with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Literal

import structlog

from shared.fleet import members
from shared.jobs import moves
from shared.lease.values import Lease, Orders
from shared.store.lifecycle import AttemptOutcome
from worker.attempt.leader import Gang
from worker.host.host import AWAY, Host

log = structlog.get_logger()

# Why an attempt must end before its trainer is done, most urgent first.
Wish = Literal["lost", "cancel", "deserted", "blind", "preempt", "pause", "evict", "drain"]
# These end the trainer at once. The others let it save a checkpoint first, except `deserted`: ranks that have lost
# a member can save none, and end by themselves.
AT_ONCE: frozenset[Wish] = frozenset({"lost", "cancel"})
# How an attempt that saved a checkpoint gives its job back, and what the job is told.
GIVEN_BACK: Final[dict[str, tuple[AttemptOutcome, str]]] = {
    "preempt": ("preempted", "The job gave its device to another one; it waits to go on from its last checkpoint."),
    "drain": ("drained", "The worker is shutting down; the job waits to go on from its last checkpoint."),
    "evict": ("preempted", "The cluster takes its machine back; the job waits to go on from its last checkpoint."),
    "blind": ("drained", "The worker lost the database for too long; the job waits to go on from its last checkpoint."),
}


class Interrupted(Exception):  # an order, not an error
    """The attempt must end where it stands."""

    def __init__(self, wish: Wish) -> None:
        super().__init__(wish)
        self.wish = wish


class LeaseKeeper(threading.Thread):
    """Heartbeats every `heartbeat_seconds`, asks for orders every `control_seconds`; stops at the end of a `with`."""

    def __init__(self, host: Host, lease: Lease, gang: Gang, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(name="lease-keeper", daemon=True)
        self._host = host
        self._lease = lease
        self._gang = gang
        self._dismissed = False
        self._clock = clock
        self._over = threading.Event()
        self._orders: Orders | None = Orders()
        self._heard = self._beaten = clock()
        self.alarm = threading.Event()

    def __enter__(self) -> LeaseKeeper:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join(15)  # a statement in flight runs ten seconds at most

    @property
    def wish(self) -> Wish | None:
        """The most urgent reason to end the attempt, or None."""
        orders = self._orders
        if orders is None:
            return "lost"
        reasons: tuple[tuple[Wish, bool], ...] = (
            ("cancel", orders.cancel),
            ("deserted", not self._dismissed and self._gang.fault is not None),
            ("blind", self._clock() - self._heard > self._host.settings.blind_seconds),
            ("preempt", orders.preempt),
            ("pause", orders.pause),
            ("evict", self._host.of_cluster and self._host.flags.draining),
            ("drain", self._host.flags.draining or (not self._dismissed and self._gang.leaving)),
        )
        return next((wish for wish, holds in reasons if holds), None)

    @property
    def lost(self) -> bool:
        """Whether nothing may be written under this lease any more."""
        return self._orders is None

    def dismissed(self) -> None:
        """The members are needed no more: what becomes of them is no reason for anything."""
        self._dismissed = True

    def check(self) -> None:
        """Raise Interrupted if the attempt must end."""
        wish = self.wish
        if wish is not None:
            raise Interrupted(wish)

    def run(self) -> None:
        while self._orders is not None and not self._over.wait(self._host.settings.control_seconds):
            self._listen()
            if self.wish is not None:
                self.alarm.set()

    def _listen(self) -> None:
        settings, now = self._host.settings, self._clock()
        try:
            if now - self._beaten >= settings.heartbeat_seconds:
                self._orders = self._host.write(
                    lambda s: moves.heartbeat(s, self._lease, lease_seconds=settings.lease_seconds)
                )
                self._beaten = now
            else:
                self._orders = self._host.write(lambda s: moves.read_orders(s, self._lease))
            if self._gang.members:
                self._gang.hear(self._host.write(lambda s: members.states(s, self._lease)))
        except AWAY as error:
            log.warning("lease.unheard", job_id=self._lease.id, error=str(error)[:200])
            return
        self._heard = now
