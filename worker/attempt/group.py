"""A group: attempts of several jobs that share a device and a program, each with a supervisor of its own in a thread.

Each is the supervisor of an attempt alone in all it does, but its trainer is a trainee of the program that all share.
What is different about its end stands here.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from functools import partial
from typing import Final

import structlog

from shared.contract.events import (
    EXIT_DONE,
    EXIT_OUT_OF_MEMORY,
    EXIT_STOPPED,
    EXIT_USER_FAULT,
    Failed,
    Metrics,
    TrainerEvent,
)
from shared.jobs import shared_devices
from shared.lease.values import Claim
from worker.attempt.shared_program import SharedProgram, UnfitTogether, WatchedTrainee
from worker.attempt.supervisor import SupervisedAttempt, TrainerEnd, carry
from worker.host.host import AWAY, Host
from worker.program import hostile_folder
from worker.program.memory_wall import Allowance, MemoryWall
from worker.program.processes import StillAlive

log = structlog.get_logger()

NO_MEMORY: Final = (
    "Memory ran out while the job trained together with others. It goes on alone, from its last checkpoint."
)
STUCK: Final = "The program that the job trained in was ended, because another job in it was stuck."
UNFIT: Final = "The job cannot train together with the others on its device after all; it is started alone."
# The program is looked after by whoever watches it.
NO_WALL: Final = Allowance(share=2**62)


def run_group(host: Host, claim: Claim) -> None:
    """Carry a claimed job and its companions to the ends of these attempts. Never raises."""
    claims = [replace(claim, companions=()), *claim.companions]
    program = SharedProgram(host, claims)
    attempts = [GroupedAttempt(host, each, program) for each in claims]
    threads = [
        threading.Thread(target=_carry, args=(attempt,), name=f"attempt-{attempt.lease.id}") for attempt in attempts
    ]
    for thread in threads:
        thread.start()
    program.serve()
    for thread in threads:
        thread.join()


def _carry(attempt: GroupedAttempt) -> None:
    try:
        carry(attempt)
    finally:  # whatever went wrong, the others do not wait for it
        with contextlib.suppress(StillAlive, OSError, hostile_folder.Refused):
            attempt.program.leave(attempt.lease.id)


class GroupedAttempt(SupervisedAttempt):
    """One of the attempts of a group."""

    def __init__(self, host: Host, claim: Claim, program: SharedProgram) -> None:
        super().__init__(host, claim)
        self.program = program
        self._measured = 0  # the step up to which its steps are counted

    def run(self) -> None:
        try:
            super().run()
        except UnfitTogether:
            alone = {"cotraining_ground": None}
            self.give_back("drained", code="cannot_train_together", message=UNFIT, next_try=alone)

    def train(self) -> TrainerEnd:
        """As alone; then nothing of it runs in the program, and it knows its part of the device's time."""
        try:
            return super().train()
        finally:
            share = self.program.leave(self.lease.id)
            try:
                self.write_in_the_end(partial(shared_devices.note_share, lease=self.lease, share=share))
            except AWAY as error:
                log.warning("share.not_reported", job_id=self.lease.id, error=str(error)[:200])

    def launch(self) -> WatchedTrainee:
        return self.program.enter(
            self.lease.id, place=self.place, story=self.story, sink=self.keep_log(), interrupt=self.keeper.check
        )

    def memory_wall(self) -> MemoryWall:
        return MemoryWall(NO_WALL, memory=lambda: (1, 1))

    def sharing(self) -> int:
        return max(1, self.program.living)

    def heard(self, event: TrainerEvent) -> None:
        super().heard(event)
        if isinstance(event, Metrics) and event.step > self._measured:
            steps = event.step - self._measured if self._measured else 1
            self._measured = event.step
            self.program.time.worked(self.lease.id, event.seconds_per_step * steps)

    def settle(self, ended: TrainerEnd) -> None:
        by_itself = ended.why is None and self.keeper.wish is None
        if by_itself and self.program.ordered and ended.exit.code not in (EXIT_DONE, EXIT_USER_FAULT):
            self.give_back("crashed", code="trainer_stalled", message=STUCK, ended=ended)
        elif by_itself and ended.exit.code == EXIT_STOPPED:
            self.shrink(ended, self.story.failed)  # it made way for others, who go on alone as well
        else:
            super().settle(ended)

    def shrink(self, ended: TrainerEnd, failed: Failed | None) -> None:
        """Out of memory together says nothing of the job alone: it has all that it had, and the device for itself."""
        failed = failed or self.program.failed
        code = failed.code if failed is not None and ended.exit.code == EXIT_OUT_OF_MEMORY else "out_of_memory"
        self.give_back("out_of_memory", code=code, message=NO_MEMORY, ended=ended)
