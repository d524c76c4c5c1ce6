"""The worker's main process between bells: reports itself and its devices, and notices when it hears no more bells."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Final, TypeVar

import psutil
import redis
import structlog
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from shared.chores import base_models
from shared.chores import table as chores
from shared.chores import waiting as lanes
from shared.fleet import members, workers
from shared.fleet.workers import DeviceReport, NewWorker
from shared.operating.isolation import isolation
from shared.settings import Settings, child_environment
from shared.settle.catalogue import Catalogue, load_catalogue
from shared.store import schema
from shared.store.bell import call, plain_url, ring
from shared.store.db import make_engine, session_scope
from shared.store.lifecycle import Lane
from shared.store.schema import SchemaOutdated
from worker import pulse
from worker.base_models import cached_names
from worker.host.devices import discover
from worker.host.flags import LANES, SharedFlags
from worker.host.found_device import FoundDevice
from worker.host.host import AWAY, identify
from worker.host.idle_memory import IdleMemory
from worker.host.libraries import fed_here, trainer_libraries
from worker.host.nvml import XidWatch
from worker.host.probing import Probes
from worker.program import processes, temporary

log = structlog.get_logger()
T = TypeVar("T")

WATCH_SECONDS: Final = 15.0
LEAVING: Final = "its worker is shutting down"
EXIT_DEAF: Final = 75  # sysexits.h EX_TEMPFAIL: whoever started us starts us again


class HomeAlreadyServed(Exception):  # a fact, named as one
    """A living worker already serves this home."""


def take_home(home: Path) -> IO[str]:
    """Become the only worker of this home, and prove that nothing of an earlier one lives.

    Returns the open lock; it is released by the kernel when this process ends, however it ends.

    Raises:
        AnotherWorker: one is at work here.
        StillAlive: an orphaned trainer survives SIGKILL.
    """
    home.mkdir(parents=True, exist_ok=True)
    lock = (home / "worker.lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise HomeAlreadyServed(f"A worker already runs in {home}.") from error
    orphans = processes.kill_orphans(home=home)
    if orphans:
        log.warning("worker.orphans_killed", pids=orphans)
    shutil.rmtree(home / "work", ignore_errors=True)
    temporary.sweep(home)
    return lock


def describe(device: FoundDevice, *, host: str, cached: list[str], warm_base: str | None = None) -> DeviceReport:
    return DeviceReport(
        id=f"{host}:{device.uuid}",
        kind=device.kind,
        name=device.name,
        total_bytes=device.total_bytes,
        free_bytes=device.free_bytes,
        foreign_bytes=device.foreign_bytes,
        healthy=device.healthy,
        ailment=device.ailment,
        bfloat16=device.bfloat16,
        cached_models=cached,
        capability=device.capability,
        probed=device.probed,
        readings=device.readings,
        warm_base=warm_base,
    )


class Presence(threading.Thread):
    """Registers, then reports every `heartbeat_seconds`. Started after the fork of the first children."""

    def __init__(
        self, settings: Settings, flags: SharedFlags, *, children: int, on_deaf: Callable[[int], None]
    ) -> None:
        super().__init__(name="presence", daemon=True)
        self._settings = settings
        self._flags = flags
        self._children = children
        self._on_deaf = on_deaf
        self._engine: Engine = make_engine(settings.database_url, pool_size=1, max_overflow=1)
        self._worker: NewWorker = replace(
            identify(settings),
            isolation=isolation(settings).document(),
            trackers=fed_here(),
            libraries=trainer_libraries(),
        )
        self._registered = False
        self._xids = XidWatch()
        self._idle = IdleMemory()
        self._probes = Probes(settings, done=self._tried)
        self._over = threading.Event()
        self._woken = threading.Event()
        self._watched = self._heard = time.monotonic()
        self._failed = False
        self._ring_after_report = False
        self._complaints: dict[str, str] = {}
        self._deputies: dict[Lane, subprocess.Popen[bytes]] = {}

    def run(self) -> None:
        while True:
            self._round()
            self._woken.wait(self._pause())
            self._woken.clear()
            if self._over.is_set():
                break
        # Here and not in `stop`: deputies die with the thread that started them (PR_SET_PDEATHSIG knows threads).
        self._dismiss_deputies()

    def _round(self) -> None:
        """One report. Whatever goes wrong, the next one is made: a worker that falls silent loses all its jobs.

        A failure that nobody foresaw is logged whole; while it lasts there is no pulse, and the health check tells it.
        """
        try:
            if not self._failed:
                pulse.beat(self._settings.home.resolve())
            self._report()
            self._watch()
        except (*AWAY, SchemaOutdated) as error:
            log.warning("presence.unheard", error=str(error)[:200])
        except Exception:  # the one place that stands around the reports
            self._failed = True
            log.exception("presence.failed")
            return
        self._failed = False

    def wake(self) -> None:
        """Have the next report made now. Safe in a signal handler's thread: it takes no lock that is held for long."""
        self._woken.set()

    def _dismiss_deputies(self) -> None:
        for deputy in self._deputies.values():
            if deputy.poll() is None:
                deputy.terminate()
                deputy.wait()

    def stop(self) -> None:
        """Say good-bye; at once if Postgres does not answer."""
        self._over.set()
        self.wake()
        self.join()
        try:
            self._write(lambda s: workers.retire(s, self._worker.id))
        except AWAY as error:
            log.warning("presence.unheard", error=str(error)[:200])

    def _pause(self) -> float:
        return self._settings.heartbeat_seconds if self._registered else min(1.0, self._settings.heartbeat_seconds)

    def _report(self) -> None:
        devices = self._devices()
        if not self._registered:
            self._write(schema.must_serve)  # until it does, we take no work
            self._write(lambda s: workers.register(s, self._worker, devices, leased=chores.leased_rows()))
            self._registered = True
            self._flags.register()
            log.info("worker.registered", worker_id=self._worker.id, devices=[device.id for device in devices])
            for lane in LANES:
                ring(lane, self._settings)
            # All workers share the bell of the CPU lane; each has a seat of its own there to take.
            call(self._worker.id, self._settings, lane="cpu")
            return
        rings, self._ring_after_report = self._ring_after_report, False
        standing = self._write(lambda s: workers.report(s, self._worker, devices))
        if rings:
            ring("training", self._settings)
        if standing is None:
            self._registered = False  # forgotten while away; the next round registers again
        elif self._flags.follow(drained=standing.draining):
            log.info("worker.drained" if standing.draining else "worker.undrained", worker_id=self._worker.id)
            for lane in LANES if not standing.draining else ():
                ring(lane, self._settings)

    def _devices(self) -> list[DeviceReport]:
        own = {child.pid for child in psutil.Process().children(recursive=True)}
        catalogue = self._catalogue()
        self._complain(catalogue.complaints())
        cached = cached_names(catalogue, cache=self._settings.cache)
        leased = self._leased()
        devices = discover(self._settings, own_pids=own, ailments=self._xids.look())
        devices = self._probes.judged(self._idle.applied(devices, leased=leased))
        if self._flags.leaving:  # a leader elsewhere must not count on devices that nobody will answer for
            devices = tuple(replace(device, ailment=LEAVING) for device in devices)
        if self._settings.launcher != "local":
            return []  # trainings go to the cluster; this worker does chores
        return [
            describe(
                device,
                host=self._worker.host,
                cached=cached,
                warm_base=self._flags.warm_base(number, among=catalogue.entries),
            )
            for number, device in enumerate(devices)
        ]

    def _leased(self) -> set[str]:
        """Uuids of our devices that jobs have. Asked before the look: a device freed meanwhile is reported as free."""
        if not self._registered:
            return set()  # nothing of ours runs, and arriving ends whatever lease we had
        ids = self._write(lambda s: workers.leased_devices(s, self._worker.id))
        return {device_id.partition(":")[2] for device_id in ids}

    def _tried(self) -> None:
        """A device has been tried: the next report says so, and jobs that wait for it hear a bell after that."""
        self._ring_after_report = True
        self.wake()

    def _catalogue(self) -> Catalogue:
        """The catalogue, completed by what Postgres knows once its schema is known to serve this version."""
        if not self._registered:
            return load_catalogue(self._settings)
        return self._write(lambda s: base_models.offered(s, self._settings))

    def _complain(self, complaints: dict[str, str]) -> None:
        """Say once what of `models.toml` cannot be used, and again when that changes."""
        if complaints != self._complaints:
            self._complaints = complaints
            for name, reason in complaints.items():
                log.warning("catalogue.unusable", entry=name, reason=reason)

    def _write(self, verb: Callable[[Session], T]) -> T:
        with session_scope(self._engine) as session:
            return verb(session)

    # --- deafness ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Work waits, a device idles, and no bell has come: take it ourselves; if the broker is well, start afresh.

        A lost bell must cost seconds, a broker that is away must cost no more than that either.
        """
        now = time.monotonic()
        if now - self._watched < min(WATCH_SECONDS, self._settings.sweep_seconds) or self._flags.draining:
            return
        self._watched = now
        waiting = self._write(self._unserved)
        for lane in waiting:
            silence = now - max(self._flags.last_pull(lane), self._heard)
            if silence > self._settings.sweep_seconds:
                self._send_deputy(lane)
            if self._is_deaf(lane, silence) and self._broker_answers():
                log.error("worker.deaf", lane=lane, silent_seconds=round(silence))
                self._on_deaf(EXIT_DEAF)
        if not waiting or not self._flags.has_idle_child(self._children):
            self._heard = now  # nobody could hear: the silence starts when work waits and a child is idle

    def _is_deaf(self, lane: Lane, silence: float) -> bool:
        """Whether to start afresh. Nobody's training ends for the CPU lane: a deputy serves that meanwhile."""
        if silence <= self._settings.deaf_seconds + 2 * self._settings.sweep_seconds:
            return False
        if not self._flags.has_idle_child(self._children):
            return False
        return lane == "training" or not (self._flags.training or self._is_represented("training"))

    def _unserved(self, session: Session) -> frozenset[Lane]:
        waiting = lanes.waiting(session)
        idle = workers.has_idle_device(session, self._worker.id)
        served = {lane for lane in LANES if lane in waiting and (lane == "cpu" or idle)}
        return frozenset(served | {"training"} if members.is_called(session, self._worker.id) else served)

    def _send_deputy(self, lane: Lane) -> None:
        """Serve the lane from a process of its own, as a bell would have."""
        if self._is_represented(lane):
            return
        log.warning("worker.unrung", lane=lane)
        argv = [sys.executable, "-m", "worker.pull", lane, str(os.getpid())]
        self._deputies[lane] = subprocess.Popen(argv, env=child_environment(), stdin=subprocess.DEVNULL)

    def _is_represented(self, lane: Lane) -> bool:
        """Whether a deputy serves the lane right now."""
        deputy = self._deputies.get(lane)
        return deputy is not None and deputy.poll() is None

    def _broker_answers(self) -> bool:
        try:
            with redis.Redis.from_url(
                plain_url(self._settings.redis_url), socket_timeout=2, socket_connect_timeout=2
            ) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False
