"""One program for several attempts, each with a trainee in it. No database.

The attempts' supervisors are threads of one process; the program is started, watched and buried by the thread that
calls `serve`, the main one: the kernel ends a program when the thread dies that started it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import structlog
from pydantic import ValidationError

from shared.contract.cotraining import END_FILE, CotrainingSpec, TraineeEnd, reason_not_together
from shared.contract.events import Failed
from shared.contract.spec import AttemptSpec
from shared.lease.values import Claim
from worker.attempt.attempt_folder import AttemptFolder, trainer_variables
from worker.attempt.divided_time import DividedTime
from worker.host.host import Host
from worker.program import hostile_folder, kernels, launcher, processes, workdir
from worker.program.launcher import Exit, Trainer
from worker.program.printed import LogSink
from worker.program.trainer_events import EventsSoFar
from worker.program.workdir import Workdir

log = structlog.get_logger()

LOOK_SECONDS: Final = 0.1
END_BYTES: Final = 4096
# Of a program whose last trainee has come to its end, until it must have ended itself.
EXIT_SECONDS: Final = 30.0
FOLDER: Final = "together"  # below `work`; no job has such an id


class UnfitTogether(Exception):  # a fact about attempts, named as one
    """This attempt cannot share the others' base after all."""


@dataclass
class _Member:
    """One attempt, as far as it has come."""

    claim: Claim
    story: EventsSoFar | None = None
    place: AttemptFolder | None = None
    gone: bool = False
    unfit: str | None = None

    @property
    def trains(self) -> bool:
        """Whether it may have something running in the program."""
        if self.place is None or self.gone or self.unfit is not None:
            return False
        return ended(self.place.folder.out) is None


@dataclass
class _Sinks:
    """Takes what the program prints, for all attempts that are there."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    open: dict[str, LogSink] = field(default_factory=dict)

    def write(self, chunk: bytes) -> None:
        with self.lock:
            for sink in self.open.values():
                sink.write(chunk)

    def finish(self) -> None:
        for job_id in tuple(self.open):
            self.close(job_id)

    def close(self, job_id: str) -> None:
        with self.lock:
            sink = self.open.pop(job_id, None)
        if sink is not None:
            sink.finish()


class SharedProgram:
    """Made with the claims; `serve` in the main thread, `enter` and `leave` in those of the attempts."""

    def __init__(self, host: Host, claims: Sequence[Claim], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._host, self._clock = host, clock
        self._members = {claim.lease.id: _Member(claim) for claim in claims}
        self._changed = threading.Condition()
        self._starting = self._started = False
        self._order: Literal["end", "abort"] | None = None
        self._fault: Exception | None = None  # why there is no program, or why it is not proven dead
        self._sinks = _Sinks()
        self.time = DividedTime(self._members, clock=clock)
        self.exit: Exit | None = None
        self.failed: Failed | None = None  # what the memory wall says of it

    # --- in the attempts' threads -----------------------------------------------------------------------------------

    def enter(
        self,
        job_id: str,
        *,
        place: AttemptFolder,
        story: EventsSoFar,
        sink: LogSink | None,
        interrupt: Callable[[], None],
    ) -> WatchedTrainee:
        """Wait until all have staged and the program runs. Raises what `interrupt` raises, OSError, UnfitTogether."""
        member = self._members[job_id]
        with self._changed:
            member.place, member.story = place, story
            if sink is not None and self._one_project:
                self._sinks.open[job_id] = sink
            elif sink is not None:
                sink.finish()  # what others' jobs print is not for this one
            self._changed.notify_all()
            while not self._started and self._fault is None and member.unfit is None:
                interrupt()
                self._changed.wait(LOOK_SECONDS)
        if member.unfit is not None:
            raise UnfitTogether(member.unfit)
        if self._fault is not None:
            raise self._fault
        return WatchedTrainee(self, job_id, place.folder.out)

    def leave(self, job_id: str) -> float:
        """The attempt is over here. Returns its part of the device's time. What it still had running is asked to stop.

        Raises StillAlive.
        """
        member = self._members[job_id]
        with self._changed:
            while self._starting and not self._started and self._fault is None:
                self._changed.wait(LOOK_SECONDS)  # its folder must not go while the program is told of it
            running = self._started and member.place is not None and not member.gone and member.unfit is None
        if running and member.place is not None:
            WatchedTrainee(self, job_id, member.place.folder.out).end(grace_seconds=0)
        with self._changed:
            member.gone = True
            self._changed.notify_all()
        self._sinks.close(job_id)
        return self.time.leave(job_id)

    def order(self, what: Literal["end", "abort"]) -> Exit:
        """Have the whole program ended; returns once nothing of it lives. Raises StillAlive."""
        with self._changed:
            self._order = self._order or what
            self._changed.notify_all()
        return self.wait_for_exit(seconds=None)

    def wait_for_exit(self, *, seconds: float | None) -> Exit:
        """How the program ended; one that takes longer than `seconds` is ended. Raises StillAlive."""
        until = None if seconds is None else self._clock() + seconds
        with self._changed:
            while self.exit is None and self._fault is None:
                if until is not None and self._clock() > until:
                    self._order = self._order or "end"
                self._changed.wait(LOOK_SECONDS)
        if self.exit is None:
            assert self._fault is not None
            raise self._fault
        return self.exit

    def is_last(self, job_id: str) -> bool:
        """Whether no other attempt has anything running in the program."""
        return not any(member.trains for name, member in self._members.items() if name != job_id)

    @property
    def ordered(self) -> bool:
        """Whether one of the attempts had the whole program ended."""
        return self._order is not None

    @property
    def living(self) -> int:
        """How many attempts have something running in the program."""
        return sum(member.trains for member in self._members.values())

    def patience(self) -> float:
        """Seconds after which a trainee that is asked to stop must have had a turn: each before it finishes its own."""
        settings = self._host.settings
        here = [member.story for member in self._members.values() if not member.gone and member.story is not None]
        if any(story.started is None for story in here):  # the base is loaded first
            return 3 * settings.stall_floor_seconds
        return settings.stop_seconds + 2 * sum(story.until_stopped(floor_seconds=0.0) for story in here)

    # --- in the main thread -----------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Start the program once every attempt has staged or gone, stay until it has ended, and prove it dead."""
        try:
            places = self._gathered()
            if places:
                self._run(places)
        except Exception as error:  # noqa: BLE001  # whatever it is, each attempt says it in its own words
            with self._changed:
                self._fault = error
                self._changed.notify_all()

    def _run(self, places: list[AttemptFolder]) -> None:
        host, lease = self._host, places[0].claim.lease
        place = host.work / FOLDER / f"{lease.id}.{lease.fence}"
        hostile_folder.remove(place)
        folder = workdir.make_ahead(place, uid=host.trainer_uid)
        try:
            trainer = self._start(places, folder)
            with self._changed:
                self._started = True
                self._changed.notify_all()
            done = self._watch(trainer, places[0])
            log.info("cotraining.ended", exit_code=done.code, jobs=list(self._members))
            with self._changed:
                self.exit = done
                self._changed.notify_all()
        finally:
            if self._one_project:
                kernels.keep(host.settings.home, places[0].claim.project_id, folder.out)
            hostile_folder.remove(folder.root)

    @property
    def _one_project(self) -> bool:
        return len({member.claim.project_id for member in self._members.values()}) == 1

    def _gathered(self) -> list[AttemptFolder]:
        with self._changed:
            while any(member.place is None and not member.gone for member in self._members.values()):
                self._changed.wait(LOOK_SECONDS)
            places = [member.place for member in self._members.values() if member.place and not member.gone]
            if not places:
                return []
            first, *others = places
            spec = _spec(first)
            for other in others:
                unfit = reason_not_together([spec, _spec(other)])
                if unfit is not None:
                    self._members[other.claim.lease.id].unfit = unfit
                    log.warning("cotraining.unfit", job_id=other.claim.lease.id, reason=unfit)
            self._starting = True
            self._changed.notify_all()
        return [place for place in places if self._members[place.claim.lease.id].unfit is None]

    def _start(self, places: list[AttemptFolder], folder: Workdir) -> Trainer:
        """Raises OSError, StillAlive."""
        host, first = self._host, places[0]
        settings, tag = host.settings, first.tag
        specs = [_spec(place) for place in places]
        cotraining = CotrainingSpec(
            trainees=specs,
            outs={place.claim.lease.id: str(place.folder.out) for place in places},
            memory_limit_bytes=specs[0].memory_limit_bytes,
        )
        folder.spec.write_text(cotraining.model_dump_json(), encoding="utf-8")
        if self._one_project:
            kernels.bring(settings.home, first.claim.project_id, folder.out)
        workdir.hand_over(folder, uid=host.trainer_uid)
        evicted = processes.kill_squatters(first.claim.device_ids, mine=tag)
        if evicted:
            log.warning("device.squatters_killed", pids=evicted, devices=list(first.claim.device_ids))
        roots = [place.folder.root for place in places]
        prepared = [place.prepared for place in places if place.prepared is not None]
        return launcher.start(
            launcher.command(settings.cotrainer, placement=first.spec.placement, spec_file=folder.spec, out=folder.out),
            environment=trainer_variables(host, first.device, first.claim.device_ids, tag, folder.out),
            tag=tag,
            out=folder.out,
            more_outs=tuple(place.folder.out for place in places),
            log_file=self._sinks if self._one_project else folder.log,
            uid=host.trainer_uid,
            isolation=host.isolation,
            reads=(folder.root, *roots, first.model, *prepared),
            home=settings.home.resolve(),
        )

    def _watch(self, trainer: Trainer, place: AttemptFolder) -> Exit:
        wall = place.memory_wall()
        while trainer.poll() is None:
            if (held := wall.exceeded()) is not None:
                done, self.failed = wall.end(trainer, held)
                return done
            with self._changed:
                if self._order is None and not all(member.gone for member in self._members.values()):
                    self._changed.wait(LOOK_SECONDS)
                    continue
            return trainer.abort() if self._order == "abort" else trainer.end(grace_seconds=0)
        return trainer.end(grace_seconds=0)


class WatchedTrainee:
    """An attempt's part of the program, as its supervisor watches it: what `launcher.Trainer` is to one alone."""

    def __init__(self, program: SharedProgram, job_id: str, out: Path) -> None:
        self._program, self._job_id, self._out = program, job_id, out
        self._code: int | None = None

    def poll(self) -> int | None:
        """What it has ended with; None while it trains."""
        if self._code is None:
            over = self._program.exit  # before the look: what the program wrote is written by then
            self._code = ended(self._out)
            if self._code is None and over is not None:
                self._code = over.code
        return self._code

    def ask_to_stop(self) -> None:
        hostile_folder.touch(self._out, "stop")

    def end(self, *, grace_seconds: float) -> Exit:
        """Have it stop at its next turn. If it does not, all end. The last one sees the program out. Raises StillAlive.

        A turn comes late, so the grace is what the others need besides.
        """
        if self.poll() is None:
            with contextlib.suppress(hostile_folder.Refused, FileNotFoundError):
                self.ask_to_stop()
            until = time.monotonic() + grace_seconds + self._program.patience()
            while self.poll() is None and time.monotonic() < until:
                time.sleep(LOOK_SECONDS)
        if self.poll() is None:
            log.warning("cotraining.deaf", job_id=self._job_id)
            self._program.order("end")
        words = ""
        if self._program.is_last(self._job_id):
            words = self._program.wait_for_exit(seconds=EXIT_SECONDS).last_words
        code = self.poll()
        assert code is not None, "it has an end, or the program has"
        return Exit(code, words)

    def abort(self) -> Exit:
        """It is stuck, and so is the process: all end, with the stacks of all threads in the log. Raises StillAlive."""
        done = self._program.order("abort")
        code = self.poll()
        return Exit(done.code if code is None else code, done.last_words)


def ended(out: Path) -> int | None:
    """The exit code that a trainee has left in its OUT; None while there is none that can be read."""
    try:
        code = TraineeEnd.model_validate_json(hostile_folder.read(out, END_FILE, most=END_BYTES)).code
    except (FileNotFoundError, hostile_folder.Refused, ValidationError):
        return None
    return code if 0 <= code <= 255 else 1


def _spec(place: AttemptFolder) -> AttemptSpec:
    return AttemptSpec.model_validate_json(place.folder.spec.read_bytes())
