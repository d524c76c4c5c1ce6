"""What one worker process stands on: settings, database, store, and the flags it shares with its siblings."""

from __future__ import annotations

import errno
import hashlib
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Final, TypeVar

import stamina
import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolExhausted
from sqlalchemy.orm import Session

from shared.chores import base_models
from shared.chores import table as chores
from shared.fleet.workers import NewWorker
from shared.lease.turns import ChoreTurn
from shared.lease.values import WrittenByNewerVersion
from shared.operating.isolation import Isolation, isolation
from shared.operating.trainer_user import own_uid
from shared.settings import Settings
from shared.settle.catalogue import Catalogue
from shared.store.db import make_engine, session_scope
from shared.store.storage import Store, open_store
from worker.host.devices import discover
from worker.host.flags import SharedFlags
from worker.host.found_device import FoundDevice
from worker.program import processes

log = structlog.get_logger()
T = TypeVar("T")

# What SQLAlchemy raises when Postgres is away, restarting, or too busy to answer in time.
AWAY: Final = (OperationalError, InterfaceError, PoolExhausted)
# Work of minutes that a worker does at the same time, in children beside those of its devices.
LONG_CHORES: Final = 2
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True)
class Host:
    """Made once per process, after the fork: connections must not cross it."""

    settings: Settings
    engine: Engine
    store: Store
    worker: NewWorker
    flags: SharedFlags
    devices: tuple[FoundDevice, ...]
    trainer_uid: int | None  # None: ours
    isolation: Isolation
    passed_over: set[str] = field(default_factory=set)  # rows of a newer version
    of_cluster: bool = False  # a cluster started this process for one attempt, and may want the machine back
    served: dict[str, str] = field(default_factory=dict)  # the project that each long chore has served last

    def write(self, verb: Callable[[Session], T]) -> T:
        """Run `verb` in a short session of its own. Raises one of `AWAY` when Postgres does not answer."""
        with session_scope(self.engine) as session:
            return verb(session)

    def write_in_the_end(self, verb: Callable[[Session], T], *, patience: float | None = None) -> T:
        """`write`, again while Postgres is away, for `patience` seconds (else for a lease). Raises one of `AWAY`."""
        seconds = self.settings.lease_seconds if patience is None else patience
        for attempt in stamina.retry_context(on=AWAY, attempts=None, timeout=seconds, wait_initial=0.1, wait_max=2.0):
            with attempt:
                return self.write(verb)
        raise AssertionError("a retry ends in a value or in its error")

    def claim(self, verb: Callable[..., T | None]) -> T | None:
        """Call `verb(session, passed_over=…)` until it claims a row that this version understands, or there is none."""
        while True:
            try:
                return self.write(lambda s: verb(s, passed_over=self.passed_over))
            except WrittenByNewerVersion as error:
                self.passed_over.add(error.row_id)
                log.warning("job.not_understood", job_id=error.row_id, remedy="a worker of a newer version takes it")

    def catalogue(self) -> Catalogue:
        """Every base model, as it stands now. Raises one of `AWAY` when Postgres is needed and stays away."""
        return self.write_in_the_end(lambda s: base_models.offered(s, self.settings))

    def turn(self, chore: str) -> ChoreTurn:
        """How this process takes long work of a chore now."""
        return chores.turn(at_most=LONG_CHORES, after=self.served.get(chore, ""))

    @property
    def work(self) -> Path:
        return work_folder(self.settings)

    @property
    def logs(self) -> Path:
        """Where trainers' logs lie until the store has them: beside `work`, which a start of the worker empties."""
        return self.settings.home.resolve() / "logs"


def children(devices: int) -> int:
    """How many children a worker needs: one for each device, some for long chores, one for short work, and one that
    waits for evaluations."""
    return devices + LONG_CHORES + 2


def open_host(settings: Settings, *, flags: SharedFlags) -> Host:
    """Connect this process to everything it needs. Nothing is dialled before it is used. Raises IsolationLacking."""
    return Host(
        settings=settings,
        engine=make_engine(settings.database_url, pool_size=3, max_overflow=2),
        store=open_store(settings),
        worker=identify(settings),
        flags=flags,
        devices=discover(settings),
        trainer_uid=own_uid(settings),
        isolation=isolation(settings),
    )


def identify(settings: Settings) -> NewWorker:
    """Who this worker is. Its id follows from host and home, so a restarted worker knows its former leases."""
    host = socket.gethostname()
    digest = hashlib.sha256(f"{host}\0{settings.home.resolve()}".encode()).hexdigest()
    return NewWorker(
        id=f"worker_{digest[:32]}",
        host=host,
        pool=settings.pool,
        boot_id=processes.boot_id(),
        version=version("tunepool-server"),
    )


def beside(settings: Settings, folder: str) -> Settings:
    """Settings of a process with a home of its own within this one: its identity is another, all else is shared."""
    home = settings.home.resolve()
    listed = home / "models.toml"
    return settings.model_copy(
        update={
            "home": home / folder,
            "storage_url": settings.storage,
            "cache_dir": settings.cache,
            "models_file": settings.models_file or (listed if listed.exists() else None),
        }
    )


def work_folder(settings: Settings) -> Path:
    """Where attempts have their folders on this host."""
    return settings.home.resolve() / "work"


def host_code(error: OSError) -> str:
    """The code of an attempt that the host itself could not carry on."""
    return "disk_full" if error.errno in _NO_ROOM else "internal_error"


def host_sentence(error: OSError, host: Host) -> str:
    """What happened, for a user: no path, no name of a file."""
    if error.errno in _NO_ROOM:
        return full_sentence(host)
    return f"The worker hit an unexpected error ({type(error).__name__})."


def full_sentence(host: Host) -> str:
    return f"Host {host.worker.host} has no room left for the job's files; free some space below TUNEPOOL_HOME there."
