"""A dispatcher's standing in the pool: the places of its cluster as devices, and its leases kept.

A thread of its own, because a cluster's program may take half a minute to answer, and a lease lasts one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import structlog
from sqlalchemy.orm import Session

from shared.chores import base_models
from shared.fleet import workers
from shared.fleet.workers import DeviceReport
from shared.jobs import cluster_attempts
from shared.settings import Settings
from shared.store import schema
from shared.store.db import make_engine, session_scope
from shared.store.schema import SchemaOutdated
from worker.host.host import AWAY, identify

log = structlog.get_logger()
T = TypeVar("T")

_BFLOAT16_CAPABILITY = 80  # Ampere, the first NVIDIA GPUs that compute in it


def places(settings: Settings, *, worker_id: str, cached: list[str]) -> list[DeviceReport]:
    """What the settings say of the cluster, as devices. Each node is a host to the plan.

    Raises:
        ValueError: the memory of a device is not set.
    """
    if settings.cluster_device_bytes is None:
        raise ValueError("TUNEPOOL_CLUSTER_DEVICE_BYTES is not set")
    capability = settings.cluster_device_capability
    kind = settings.cluster_device_kind
    nodes = [f"{settings.launcher}-{worker_id[-6:]}-{node}" for node in range(settings.cluster_nodes)]
    return [
        DeviceReport(
            id=f"{node}:{kind}-{index}",
            kind=kind,
            name=settings.cluster_device_name,
            total_bytes=settings.cluster_device_bytes,
            free_bytes=settings.cluster_device_bytes,
            foreign_bytes=0,
            healthy=True,
            bfloat16=kind == "rocm" or (capability or 0) >= _BFLOAT16_CAPABILITY,
            # A node fetches what it lacks when an attempt starts there.
            cached_models=cached,
            capability=capability,
            host=node,
        )
        for node in nodes
        for index in range(settings.cluster_node_devices)
    ]


class ClusterPresence(threading.Thread):
    """Registers, then reports every `heartbeat_seconds`. A dispatcher that starts again keeps its leases."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(name="standing", daemon=True)
        self._settings = settings
        self._engine = make_engine(settings.database_url, pool_size=1, max_overflow=0)
        self._over = threading.Event()
        self.worker = identify(settings)
        self.registered = False

    def run(self) -> None:
        while not self._over.is_set():
            self.report()
            self._over.wait(self._settings.heartbeat_seconds if self.registered else 1.0)

    def report(self) -> None:
        """Say that we are there and keep what is submitted; while Postgres is away, later."""
        try:
            if not self.registered:
                self._write(schema.must_serve)
            self._write(self._say)
        except (*AWAY, SchemaOutdated) as error:
            log.warning("dispatcher.unheard", error=str(error)[:200])

    def _say(self, session: Session) -> None:
        cached = base_models.offered(session, self._settings).names()
        devices = places(self._settings, worker_id=self.worker.id, cached=list(cached))
        cluster_attempts.keep_submitted(session, self.worker.id, lease_seconds=self._settings.lease_seconds)
        if self.registered:
            self.registered = workers.report(session, self.worker, devices) is not None
        else:
            # No lease is given up: what was submitted before is still so.
            workers.register(session, self.worker, devices, leased=())
            self.registered = True

    def stop(self) -> None:
        """Leave the plan. What is submitted waits for the next start for a lease and its grace, and no longer."""
        self._over.set()
        self.join()
        try:
            self._write(lambda s: workers.retire(s, self.worker.id))
        except AWAY as error:
            log.warning("dispatcher.unheard", error=str(error)[:200])
        self.close()

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def _write(self, verb: Callable[[Session], T]) -> T:
        with session_scope(self._engine) as session:
            return verb(session)
