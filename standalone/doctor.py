"""`tunepool-server doctor`: looks at every part of an installation, and says what to do.

It changes nothing: the object that it writes into the store it removes again. Each part is looked at even where
another is away.
"""

from __future__ import annotations

import asyncio
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Final

from obstore.exceptions import BaseError
from sqlalchemy import func, select
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session

from shared.chores import base_models
from shared.errors import NotFound, TunepoolError
from shared.fleet.workers import SILENCE
from shared.ids import new_id
from shared.jobs import pages
from shared.operating import administration
from shared.plan.scheduling import Policy
from shared.settings import Settings
from shared.settle.catalogue import Catalogue, load_catalogue
from shared.store import bell, schema
from shared.store.db import make_engine, session_scope
from shared.store.storage import open_store
from shared.store.tables import DeviceRow, WorkerRow
from standalone import host_report
from standalone.findings import Finding, fault, ok, warning
from standalone.home import Home
from standalone.up import PortTaken, answers, free_port

GIB: Final = 1 << 30
# Postgres stops when its disk is full; below this it is about to.
DISK_FAULT_BYTES: Final = 1 * GIB
# One base model of 8B parameters in 16 bits (16 GB), and a work folder.
DISK_WARNING_BYTES: Final = 25 * GIB
CLOCK_WARNING_SECONDS: Final = 2.0
# S3 refuses a signature whose clock is 15 minutes off; long before that, logs and forecasts mislead.
CLOCK_FAULT_SECONDS: Final = 60.0
REDIS_SECONDS: Final = 2.0


@dataclass(frozen=True)
class Installation:
    """What is looked at. `database_url` and `redis_url` are empty where nobody named one and no `up` runs."""

    settings: Settings
    home: Home
    database_url: str
    redis_url: str
    port: int

    def findings(self) -> Iterator[Finding]:
        """Every part in the order in which one mends them."""
        yield from self._database()
        yield from self._store()
        yield self._redis()
        yield from self._fleet()
        yield from host_report.findings(self.home, self.settings, served=self._served_here)
        yield from self._models()
        yield from disk(self.home.path)
        yield from self._ports()
        yield from secrets(self.home)

    # --- Postgres ---------------------------------------------------------------------------------------------------

    def _database(self) -> Iterator[Finding]:
        if not self.database_url:
            yield fault(
                "database",
                f"DATABASE_URL is not set, and no 'tunepool-server up' runs in {self.home.path}.",
                "Start `tunepool-server up`, or set DATABASE_URL; another home: --home.",
            )
            return
        if isinstance(self._look, Finding):
            yield self._look
            return
        if self._look.outdated:
            yield fault("database", self._look.outdated, "Run `tunepool-server migrate`.")
        else:
            yield ok("database", f"It answers in {self._look.milliseconds:.0f} ms and is migrated.")
        yield clock(self._look.ahead_seconds)

    @cached_property
    def _look(self) -> _Seen | Finding:
        """One session for all questions to Postgres; a finding where it does not answer."""
        engine = make_engine(self.database_url, pool_size=1, max_overflow=0)
        try:
            with session_scope(engine) as session:
                return _seen(session, self.settings)
        except (OperationalError, InterfaceError) as error:
            reason = str(error.orig).strip().replace("\n", " ")[:300]
            return fault("database", f"It does not answer: {reason}", "Start it, or correct DATABASE_URL.")
        finally:
            engine.dispose()

    @property
    def _known(self) -> _Seen | None:
        """What Postgres told; None where it could not be asked, which is said once."""
        return self._look if self.database_url and isinstance(self._look, _Seen) else None

    # --- the servers beside it --------------------------------------------------------------------------------------

    def _store(self) -> Iterator[Finding]:
        """Write an object, read it, remove it."""
        where = self.settings.storage.split("?")[0]
        key, content = f"doctor/{new_id('probe')}", b"tunepool-server doctor"
        remedy = "Check STORAGE_URL, TUNEPOOL_STORAGE_* and the rights on the bucket or folder."
        try:
            store = open_store(self.settings)
            asyncio.run(store.check())
            store.put_bytes(key, content)
            read = b"".join(store.chunks(key))
            store.delete([key])
        except (TunepoolError, BaseError, OSError, ValueError) as error:
            yield fault("store", f"{where}: {str(error)[:300]}", remedy)
            return
        if read != content or _is_there(store.chunks(key)):
            yield fault("store", f"{where}: what was written does not read back, or cannot be removed.", remedy)
            return
        yield ok("store", f"{where}: an object was written, read and removed.")
        hosts = {worker.host for worker in self._known.workers} if self._known else set()
        if where.startswith("file://") and len(hosts) > 1:
            yield warning(
                "store",
                f"A folder serves workers on {len(hosts)} hosts: {', '.join(sorted(hosts))}.",
                "All must see the same folder (a shared file system); else set STORAGE_URL to a bucket.",
            )

    def _redis(self) -> Finding:
        if not self.redis_url:
            return warning(
                "redis",
                f"REDIS_URL is not set, and no 'tunepool-server up' runs in {self.home.path}.",
                "Set REDIS_URL: workers do not start without it.",
            )
        patient = self.settings.model_copy(update={"redis_url": self.redis_url, "ring_seconds": REDIS_SECONDS})
        if bell.answers(patient):
            return ok("redis", "It answers.")
        return fault(
            "redis",
            f"It does not answer within {REDIS_SECONDS:g} s. Jobs are accepted, but start late.",
            "Start it, or correct REDIS_URL. Nothing has to be restored.",
        )

    # --- devices and models -----------------------------------------------------------------------------------------

    def _fleet(self) -> Iterator[Finding]:
        """Workers and devices of the pool, as they last reported themselves."""
        if self._known is None:
            return
        yield from fleet(self._known, pool=self.settings.pool)

    @property
    def _served_here(self) -> bool:
        """Whether a worker of this very home reports its devices already."""
        return self.home.worker_beats(self.settings.lease_seconds)

    def _models(self) -> Iterator[Finding]:
        catalogue = self._known.catalogue if self._known else load_catalogue(self.settings)
        names = catalogue.names()
        yield ok("models", f"{len(names)} may be used: {', '.join(names[:20])}{' …' if len(names) > 20 else ''}")
        for name, reason in catalogue.complaints().items():
            yield fault("models", f"{name}: {reason}", "Correct the entry; it is read again at once.")
        for name, entry in catalogue.pending.items():
            note = entry.note or "A worker looks it up at the hub."
            yield warning("models", f"{name}: resolving. {note}", "Wait, and see that a worker runs.")

    # --- this host --------------------------------------------------------------------------------------------------

    def _ports(self) -> Iterator[Finding]:
        if answers(self.port)():
            yield ok("ports", f"The API answers on port {self.port} of 127.0.0.1.")
        else:
            try:
                free_port(self.port)
            except PortTaken as error:
                yield fault("ports", str(error), "End that program, or start ours with another --port.")
            else:
                yield ok("ports", f"Port {self.port} of 127.0.0.1 is free.")
        low, _, high = self.settings.gang_ports.partition("-")
        if low and not any(_can_listen(port) for port in range(int(low), int(high) + 1)):
            yield warning(
                "ports",
                f"No port of TUNEPOOL_GANG_PORTS={self.settings.gang_ports} is free.",
                "Jobs on several hosts meet there; free some, or name another range.",
            )


@dataclass(frozen=True)
class _Seen:
    """Facts from Postgres. Without this version's schema there is one: that it answers."""

    milliseconds: float
    ahead_seconds: float  # this host's clock against the database's
    outdated: str
    workers: Sequence[WorkerRow]
    devices: Sequence[DeviceRow]
    catalogue: Catalogue


def _seen(session: Session, settings: Settings) -> _Seen:
    session.execute(select(1))  # connecting is no part of the time that a question takes
    asked, host = time.monotonic(), time.time()
    database = session.execute(select(func.clock_timestamp())).scalar_one().timestamp()
    took = time.monotonic() - asked
    try:
        schema.must_serve(session)
    except schema.SchemaOutdated as error:
        outdated, workers, devices, catalogue = error.message, [], [], load_catalogue(settings)
    else:
        outdated, workers = "", list(administration.all_workers(session))
        devices = list(pages.devices(session, pool_name=settings.pool))
        catalogue = base_models.offered(session, settings)
    return _Seen(took * 1000, host + took / 2 - database, outdated, workers, devices, catalogue)


def clock(ahead_seconds: float) -> Finding:
    """This host's clock against the database's. Leases stand on the database's alone."""
    off, way = abs(ahead_seconds), "ahead of" if ahead_seconds > 0 else "behind"
    remedy = "Have both hosts keep time by NTP (chrony, systemd-timesyncd)."
    if off <= CLOCK_WARNING_SECONDS:
        return ok("clock", f"This host and the database differ by {off:.1f} s.")
    words = f"This host is {off:.0f} s {way} the database."
    if off <= CLOCK_FAULT_SECONDS:
        return warning("clock", words, remedy)
    return fault("clock", f"{words} Signed links and the store's signatures may be refused.", remedy)


def fleet(seen: _Seen, *, pool: str, now: datetime | None = None) -> Iterator[Finding]:
    """Workers and devices of one pool."""
    moment = (now or datetime.now(UTC)).timestamp() - seen.ahead_seconds  # as the database counts
    silent = {}
    for worker in seen.workers:
        quiet = moment - worker.last_seen.timestamp()
        if worker.pool == pool and quiet > SILENCE.total_seconds() and worker.last_seen.timestamp() > 0:
            silent[worker.id] = quiet
            yield fault(
                "workers",
                f"{worker.id} on {worker.host} has been silent for {quiet:.0f} s.",
                "Look at that host and its worker's log; start it again.",
            )
    if not seen.outdated and not any(device.worker_id not in silent for device in seen.devices):
        yield fault("devices", f"No worker serves pool '{pool}'; jobs wait.", "Start one: `tunepool-server worker`.")
    for device in seen.devices:
        yield _device(device)


def _device(row: DeviceRow) -> Finding:
    name = f"{row.id} ({row.name}, {row.total_bytes / GIB:.0f} GiB)"
    if not row.healthy:
        return fault("devices", f"{name}: {row.ailment or 'unhealthy'}", "No job runs there until that is mended.")
    if row.quarantined:
        return warning("devices", f"{name} is quarantined.", f"Put it back: `tunepool devices release {row.id}`.")
    if row.foreign_bytes > Policy().foreign_tolerance_bytes:
        return warning(
            "devices",
            f"{name}: strangers hold {row.foreign_bytes / GIB:.1f} GiB.",
            "Jobs pass it by; see `nvidia-smi` there.",
        )
    return ok("devices", f"{name}{' runs a job' if row.leased_by else ' is free'}.")


def disk(home: Path) -> Iterator[Finding]:
    """Room for base models, work folders and, under `up`, the database."""
    place = home if home.is_dir() else next(parent for parent in home.parents if parent.is_dir())
    yield room(home, shutil.disk_usage(place).free)


def room(home: Path, free: int) -> Finding:
    remedy = f"Free some below {home}, or move it: TUNEPOOL_HOME."
    words = f"{free / GIB:.1f} GiB are free at {home}."
    if free < DISK_FAULT_BYTES:
        return fault("disk", words, remedy)
    if free < DISK_WARNING_BYTES:
        return warning("disk", f"{words} A base model of 8B parameters takes 16.", remedy)
    return ok("disk", words)


def secrets(home: Home) -> Iterator[Finding]:
    """Files that hold secrets are their owner's alone."""
    for file in (home.credentials, home.path / "signing-secret"):
        if file.is_file() and stat.S_IMODE(file.stat().st_mode) & 0o077:
            yield fault("secrets", f"{file} can be read by others.", f"chmod 600 {file}; then make new secrets.")


def _is_there(chunks: Iterator[bytes]) -> bool:
    try:
        next(chunks, None)
    except NotFound:
        return False
    return True


def _can_listen(port: int) -> bool:
    try:
        free_port(port)
    except PortTaken:
        return False
    return True
