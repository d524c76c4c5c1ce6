"""A spare: a program that was started ahead, has imported its libraries, and waits for its work.

It is a trainer or an evaluation's program. It is started by the launcher as any such program is: user, limits, walls,
environment and folder are those of one that starts cold. Until it is handed over it has read no byte of a stranger. It
carries out one attempt and ends with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import select
import shutil
import socket
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Final

import psutil
import structlog

from shared.contract.handover import TAKEN, WAITING, Handover
from shared.contract.prepared import HeldBase
from shared.operating.isolation import Isolation
from worker.program import hostile_folder, launcher, processes, workdir
from worker.program.launcher import Trainer
from worker.program.processes import Tag
from worker.program.workdir import Workdir

log = structlog.get_logger()

# As the job of its tag: no job has such an id.
SPARE: Final = "spare"
EVALUATION_SPARE: Final = "evaluation-spare"
# Imports take 10 to 15 s of a slow core; one that takes so long hangs.
LOAD_SECONDS: Final = 180.0
# One that waits reads its work within milliseconds.
TAKE_SECONDS: Final = 10.0
LOOK_SECONDS: Final = 0.1
_LIBRARIES: Final = ("tunepool-server", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
_NUMBERS: Final = itertools.count(1)


class NotTaken(Exception):  # a fact, named as one
    """A spare did not take the work; the words say why."""


class Spare:
    """A living spare, its folder, and the line to it."""

    def __init__(
        self,
        trainer: Trainer,
        *,
        line: socket.socket,
        folder: Workdir,
        tag: Tag,
        build: str,
        held: HeldBase | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.tag, self.held = folder, tag, held
        self._trainer, self._line, self._build, self._clock = trainer, line, build, clock
        self._begun = clock()
        self._heard = b""
        self._given = self._ended = False
        self._line.settimeout(0)

    @property
    def pid(self) -> int:
        return self._trainer.pid

    @property
    def ready(self) -> bool:
        """Whether it has imported everything and waits."""
        self._listen()
        return self._heard.startswith(WAITING)

    @property
    def serves(self) -> bool:
        """Whether nobody has ended it: its attempt goes by its tag."""
        return not self._ended

    @property
    def age(self) -> float:
        """Seconds since its start."""
        return self._clock() - self._begun

    @property
    def held_bytes(self) -> int:
        """Resident memory; 0 once it has ended."""
        with contextlib.suppress(psutil.Error):
            return int(psutil.Process(self.pid).memory_info().rss)
        return 0

    def fault(self) -> str | None:
        """Why it is no good any more, or None. Cheap: asked each second, of each idle device."""
        code = self._trainer.poll()
        if code is not None:
            return f"it has ended with exit code {code}"
        if not self.ready and self.age > LOAD_SECONDS:
            return f"it has been loading for {LOAD_SECONDS:.0f} seconds"
        return None

    def reason_not_to_give(self) -> str | None:
        """Why it must not be handed over, or None. Looks at every file of the trainer."""
        if (fault := self.fault()) is not None:
            return fault
        return "the program or its libraries have changed since its start" if self._build != installed() else None

    def hand_over(self, work: Handover, *, interrupt: Callable[[], None]) -> Trainer:
        """Give it its work; from here on it is a trainer as any other. One that still loads is waited for.

        Raises:
            NotTaken: it cannot, or does not. It must be ended before anything else is started in its folder.
            Whatever `interrupt` raises.
        """
        with contextlib.closing(self._line):
            while not self.ready:
                self._must_be_well()
                interrupt()
                self._rest()
            if (reason := self.reason_not_to_give()) is not None:
                raise NotTaken(reason)
            try:
                self._line.sendall(work.model_dump_json().encode() + b"\n")
            except OSError as error:
                raise NotTaken(f"it cannot be reached ({error.strerror})") from error
            deadline = self._clock() + TAKE_SECONDS
            while self._heard != WAITING + TAKEN:
                self._must_be_well()
                if self._clock() > deadline:
                    raise NotTaken(f"it does not answer within {TAKE_SECONDS:.0f} seconds")
                self._rest()
                self._listen()
        self._given = True
        return self._trainer

    def end(self) -> None:
        """Nothing of one that waits lives afterwards; who has been given its work goes on. Raises StillAlive."""
        self._line.close()
        if not self._ended and not self._given:  # the attempt that has it ends it
            self._trainer.end(grace_seconds=0)
            self._ended = True

    def remove(self) -> None:
        """End it, and leave nothing of it on the disk. Raises StillAlive."""
        self.end()
        hostile_folder.remove(self.folder.root)

    def _must_be_well(self) -> None:
        if (fault := self.fault()) is not None:
            raise NotTaken(fault)

    def _rest(self) -> None:
        """Until it says something, but not for long."""
        waiting = select.poll()
        waiting.register(self._line, select.POLLIN)
        waiting.poll(LOOK_SECONDS * 1000)

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # nothing said, or closed
            self._heard += self._line.recv(64)


def nothing(_folder: Workdir) -> HeldBase | None:
    """No base: the spare holds its libraries only."""
    return None


def start(
    module: str,
    *,
    place: Path,
    home: Path,
    environment: Callable[[Tag, Path], dict[str, str]],
    uid: int | None,
    isolation: Isolation,
    hold: Callable[[Workdir], HeldBase | None] = nothing,
    called: str = SPARE,
) -> Spare:
    """Start `module` ahead, in a folder of its own below `place`; `environment` makes its variables of tag and OUT.

    `hold`: the base model that one with this folder is to hold in memory; its files are noted as used by the folder.
    `called`: as the job of its tag.

    Raises OSError.
    """
    number = next(_NUMBERS)
    tag = processes.own_tag(home=home, job_id=called, fence=number)
    build = installed()
    folder = workdir.make_ahead(place / f"{tag.supervisor_pid}-{number}", uid=uid)
    ours, its = socket.socketpair()
    try:
        held = _told(folder, hold(folder), uid=uid)
        trainer = launcher.start(
            launcher.command_ahead(module, channel=its.fileno(), held=None if held is None else folder.held),
            environment=environment(tag, folder.out),
            tag=tag,
            out=folder.out,
            log_file=folder.log,
            uid=uid,
            isolation=isolation,
            reads=(folder.root, *readable(held)),
            home=home,
            keep_open=(its.fileno(),),
        )
    except BaseException:
        ours.close()
        hostile_folder.remove(folder.root)
        raise
    finally:
        its.close()
    return Spare(trainer, line=ours, folder=folder, tag=tag, build=build, held=held)


def _told(folder: Workdir, held: HeldBase | None, *, uid: int | None) -> HeldBase | None:
    if held is not None:
        folder.held.write_text(held.model_dump_json(), encoding="utf-8")
        workdir.hand_over(folder, uid=uid)
    return held


def readable(held: HeldBase | None) -> tuple[Path, ...]:
    """The folders that a spare may read for the base that it holds."""
    return () if held is None else (Path(held.base_model_path), Path(held.prepared_path))


def handed_over(ahead: Spare | None, work: Handover, *, interrupt: Callable[[], None]) -> Trainer | None:
    """The spare as the program of this work; None when there is none that takes it, and then none of it lives.

    Raises what `interrupt` raises, StillAlive.
    """
    if ahead is None or not ahead.serves:
        return None
    try:
        trainer = ahead.hand_over(work, interrupt=interrupt)
    except NotTaken as fault:
        log.warning("spare.not_used", pid=ahead.pid, reason=str(fault))
        ahead.end()
        return None
    log.info("spare.handed_over", pid=trainer.pid)
    return trainer


def within_walls(
    ahead: Spare, model: Path, isolation: Isolation, *, prepared: Path | None = None
) -> tuple[Path, Path | None]:
    """Where the spare may read a base model and its prepared form; it is ended where it cannot read them.

    Where Landlock names what a program may read, a spare's rules are older than our choice of a model. So the files of
    a model that it does not hold get a second name in its folder. Raises StillAlive.
    """
    if isolation.files != "rules" or {model, prepared} <= {None, *readable(ahead.held)}:
        return model, prepared
    linked = None if prepared is None else ahead.folder.prepared / prepared.name
    try:
        shutil.copytree(model, ahead.folder.base, copy_function=os.link)
        if prepared is not None and linked is not None:
            shutil.copytree(prepared, linked, copy_function=os.link)
    except (OSError, shutil.Error) as error:
        log.info("spare.not_used", pid=ahead.pid, reason=f"the model cannot be linked: {error}"[:200])
        ahead.end()
        return model, prepared
    return ahead.folder.base, linked


def installed() -> str:
    """A word that changes when the programs of the training stack or its libraries are replaced on the disk."""
    digest = hashlib.sha256()
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            digest.update(f"{name} {metadata.version(name)}\n".encode())
    ours = Path(__file__).parents[2]
    for file in sorted(path for part in ("worker/train", "shared/contract") for path in (ours / part).rglob("*.py")):
        with contextlib.suppress(FileNotFoundError):
            digest.update(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()
