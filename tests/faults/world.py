"""Everything a fault schedule breaks: servers behind proxies, a worker and two janitors that are started again when
they die, and a client that remembers what it was told."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import psycopg
import redis
from sqlalchemy import make_url, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from shared.errors import TunepoolError
from shared.jobs import moves
from shared.store.bell import ring
from shared.store.db import session_scope
from shared.store.tables import DeviceRow, JobRow
from standalone.up import api_command, free_port
from tests import living
from tests.faults.conftest import own_servers, postgres_admin, s3_environment, s3_server
from tests.faults.proxy import FAIR, Proxy, Weather
from tests.faults.schedules import Fault, PlannedJob, Schedule
from tests.lifecycle.stack import Stack, TooSlow, chain_of, forget_everything, open_stack, until
from tests.patience import lease, patience

SETTLED_SECONDS = 90.0
FINAL = {"succeeded", "failed", "cancelled"}


@dataclass
class Kept:
    """A process that whoever started it starts again, as systemd would."""

    start: Callable[[], subprocess.Popen[bytes]]
    process: subprocess.Popen[bytes]


@dataclass
class Accepted:
    """What the client was told: the job is ours, and whether a cancel of it was accepted."""

    id: str
    plan: PlannedJob
    cancelled: bool = False
    seen: list[str] = field(default_factory=list)


class World:
    """A stack with its three servers behind proxies; reused from schedule to schedule."""

    def __init__(self, stack: Stack, proxies: dict[str, Proxy], environment: dict[str, str]) -> None:
        self.stack = stack
        self.proxies = proxies
        self._environment = environment
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._frozen: set[int] = set()
        self._failpoint = ""
        self.worker = Kept(self._start_worker, self._start_worker())
        self.port = free_port(0)
        self._slow: list[socket.socket] = []
        self.api = Kept(self._start_api, self._start_api())
        self.kept = [self.worker, self.api, *(Kept(self._start_janitor, self._start_janitor()) for _ in range(2))]
        self._minder = threading.Thread(target=self._mind, name="minder", daemon=True)
        self._minder.start()
        stack.wait_for_worker()

    def close(self) -> None:
        self._over.set()
        self._minder.join()
        self.thaw()
        self.stack.stop()
        for proxy in self.proxies.values():
            proxy.close()

    def _start_worker(self) -> subprocess.Popen[bytes]:
        return self.stack.start_worker(**self._environment, TUNEPOOL_FAILPOINT=self._failpoint)

    def _start_janitor(self) -> subprocess.Popen[bytes]:
        return self.stack.start_janitor(**self._environment)

    def _start_api(self) -> subprocess.Popen[bytes]:
        _, *argv = api_command("127.0.0.1", self.port, processes=1)
        return self.stack.start(argv, name="api", **self._environment)

    def _mind(self) -> None:
        while not self._over.wait(0.1):
            with self._lock:
                for kept in self.kept:
                    if kept.process.poll() is not None:
                        self.stack.processes.remove(kept.process)
                        kept.process = kept.start()

    def use_failpoint(self, failpoint: str) -> None:
        """Have the worker started again under another failpoint; with none, nothing it froze stays frozen."""
        if failpoint == self._failpoint:
            return
        with self._lock:
            self._failpoint = failpoint
            (self.stack.settings.home / "failpoint").unlink(missing_ok=True)
            self.worker.process.kill()

    # --- a schedule -------------------------------------------------------------------------------------------------

    def run(self, schedule: Schedule) -> list[str]:
        """Play it to the end; what is broken afterwards, empty when all is well. Raises TooSlow when a job hangs."""
        self.use_failpoint(schedule.failpoint)
        accepted: list[Accepted] = []
        acts = sorted(self._acts(schedule, accepted), key=lambda act: act[0])
        began = time.monotonic()
        for at, act in acts:
            time.sleep(max(0.0, began + at - time.monotonic()))
            with contextlib.suppress(
                SQLAlchemyError, TunepoolError, psutil.NoSuchProcess, redis.RedisError
            ):  # the client hears "no" and remembers nothing
                act()
        self.heal()
        self.use_failpoint("")
        self._settle(accepted)
        until(self._api_answers, seconds=30, what="an answer of the API")
        return self._judge(accepted)

    def _acts(self, schedule: Schedule, accepted: list[Accepted]) -> list[tuple[float, Callable[[], Any]]]:
        acts: list[tuple[float, Callable[[], Any]]] = []
        for job in schedule.jobs:
            acts.append((job.at, lambda job=job: accepted.append(Accepted(self.stack.submit(job.behaviour), job))))
            if job.cancel_at is not None:
                acts.append((job.cancel_at, lambda job=job: self._cancel(job, accepted)))
            if job.pause_at is not None:
                acts.append((job.pause_at, lambda job=job: self._pause(job, accepted)))
        for fault in schedule.faults:
            acts.append((fault.at, lambda fault=fault: self.strike(fault)))
            acts.append((fault.at + fault.seconds, lambda fault=fault: self.mend(fault)))
        return acts

    def _cancel(self, job: PlannedJob, accepted: list[Accepted]) -> None:
        for known in accepted:
            if known.plan is job:
                self.stack.cancel(known.id)
                known.cancelled = True

    def _pause(self, job: PlannedJob, accepted: list[Accepted]) -> None:
        for known in accepted:
            if known.plan is job:
                with session_scope(self.stack.engine) as session:
                    moves.request_pause(session, known.id, project_id=self.stack.caller.project_id)

    # --- what breaks ------------------------------------------------------------------------------------------------

    def strike(self, fault: Fault) -> None:
        what, _, whom = fault.name.partition(" ")
        if what in _WEATHER:
            self.proxies[whom].set(_WEATHER[what])
            if what in ("cut", "refuse"):
                self.proxies[whom].cut()
        elif what in ("kill", "freeze"):
            self._signal(self._victims(whom), what)
        else:
            self._others()[fault.name]()

    def _victims(self, whom: str) -> list[psutil.Process]:
        main, trainers = self.worker.process.pid, self.stack.trainers()
        match whom:
            case "worker":
                inner = {process.pid for process in trainers}
                return [psutil.Process(main), *(one for one in living.family(main) if one.pid not in inner)]
            case "supervisor":
                parents = [living.parent(process) for process in trainers]
                return [parent for parent in parents if parent is not None and parent.pid != main]
            case "trainer":
                return trainers
            case "janitor":
                return [psutil.Process(self.kept[-1].process.pid)]
            case _:
                pid = self.stack.servers.valkey.pid
                return [psutil.Process(pid)] if living.is_alive(pid) else []

    def _others(self) -> dict[str, Callable[[], None]]:
        return {
            "drain worker": self.worker.process.terminate,
            "flush redis": partial(forget_everything, self.stack),
            "restart postgres": partial(self._stop_postgres, signal.SIGINT),
            "crash postgres": partial(self._stop_postgres, signal.SIGQUIT),
            "end backends": self._end_backends,
            "ring often": self._ring_often,
            "crowd api": self._crowd_api,
        }

    def _stop_postgres(self, number: signal.Signals) -> None:
        pid = self.stack.servers.postgres.pid
        if pid is not None and living.is_alive(pid):
            os.kill(pid, number)
            os.waitpid(pid, 0)

    def _end_backends(self) -> None:
        with contextlib.suppress(psycopg.Error), postgres_admin(self.stack.servers.postgres) as admin:
            admin.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where pid <> pg_backend_pid() and datname is not null"
            )

    def _ring_often(self) -> None:
        for _ in range(30):
            ring("training", self.stack.settings)
            ring("cpu", self.stack.settings)

    def _crowd_api(self) -> None:
        """Clients that send half a head, or half a body, and then nothing."""
        body = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
        halves = (b"GET /livez HTTP/1.1\r\nX-A: ", body)
        for number in range(200):
            with contextlib.suppress(OSError):
                end = socket.create_connection(("127.0.0.1", self.port), timeout=patience(5))
                self._slow.append(end)
                end.sendall(halves[number % 2])

    def _api_answers(self) -> bool:
        address = f"http://127.0.0.1:{self.port}/livez"
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=patience(5)) as reply:
            return bool(reply.status == 200)
        return False

    def _uncrowd(self) -> None:
        while self._slow:
            self._slow.pop().close()

    def mend(self, fault: Fault) -> None:
        what, _, whom = fault.name.partition(" ")
        servers = self.stack.servers
        if whom in self.proxies and what in _WEATHER:
            self.proxies[whom].set(FAIR)
        elif what == "freeze":
            self.thaw()
        elif what == "crowd":
            self._uncrowd()
        elif fault.name == "kill redis" and not living.is_alive(servers.valkey.pid):
            servers.valkey.start()
        elif whom == "postgres" and not living.is_alive(servers.postgres.pid):
            servers.postgres.start()

    def heal(self) -> None:
        """End every fault."""
        for proxy in self.proxies.values():
            proxy.set(FAIR)
        self.thaw()
        self._uncrowd()
        for server in (self.stack.servers.valkey, self.stack.servers.postgres):
            if not living.is_alive(server.pid):
                server.start()

    def _signal(self, processes: list[psutil.Process], what: str) -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if what == "kill":
                    process.kill()
                else:
                    process.suspend()
                    self._frozen.add(process.pid)

    def thaw(self) -> None:
        """Let everything run that we, or a failpoint, have frozen."""
        family = living.family(self.worker.process.pid)
        for pid in {*self._frozen, *(process.pid for process in family)}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._frozen.clear()

    # --- what must hold ---------------------------------------------------------------------------------------------

    def _settle(self, accepted: list[Accepted]) -> None:
        """Wait until every job has ended, those too of which the client heard nothing; paused ones go on."""

        def settled() -> bool:
            with Session(self.stack.engine) as session:
                states = {row.id: row.status for row in session.execute(select(JobRow.id, JobRow.status))}
            for known in accepted:
                known.seen.append(states.get(known.id, "gone"))
            for job_id in (job_id for job_id, status in states.items() if status == "paused"):
                with session_scope(self.stack.engine) as session:
                    moves.resume(session, job_id, project_id=self.stack.caller.project_id)
            return FINAL.issuperset(states.values())

        def calm() -> bool:
            with contextlib.suppress(SQLAlchemyError):
                return settled()
            return False

        until(calm, seconds=SETTLED_SECONDS, what=f"the end of every job: {self._unfinished()}")
        until(lambda: self.stack.trainers() == [], seconds=10, what="the end of every trainer")

    def _unfinished(self) -> list[str]:
        with contextlib.suppress(SQLAlchemyError), Session(self.stack.engine) as session:
            return list(session.scalars(select(JobRow.id).where(JobRow.status.not_in(FINAL))))
        return ["the database is away"]

    def _judge(self, accepted: list[Accepted]) -> list[str]:
        broken = self.stack.broken_invariants()
        with Session(self.stack.engine) as session:
            if any(session.scalars(select(DeviceRow.leased_by)).all()):
                broken.append("a device is leased though every job has ended")
        for known in accepted:
            broken += self._judge_job(known)
        return broken

    def _judge_job(self, known: Accepted) -> list[str]:
        job = self.stack.job(known.id)
        wanted = "cancelled" if known.cancelled else known.plan.ends
        broken = []
        if job.status != wanted and not (known.cancelled and job.status == known.plan.ends == "failed"):
            broken.append(f"{known.id} is {job.status} ({job.error}), not {wanted}")
        ended = [status for status in known.seen if status in FINAL]
        if len(set(ended)) > 1 or "gone" in known.seen:
            broken.append(f"I8/I1 {known.id} was seen as {known.seen}")
        if job.status == "succeeded":
            steps = int(known.plan.behaviour.partition("steps=")[2].partition(" ")[0])
            if self.stack.chain(job.manifest) != chain_of(steps):
                broken.append(f"{known.id} skipped or repeated a step")
        return broken


_WEATHER = {
    "cut": FAIR,
    "refuse": Weather(refuse=True),
    "silence": Weather(silent=True),
    "slow": Weather(delay_seconds=0.05, bytes_per_second=20_000),
    "reset": Weather(reset_after_bytes=1500),
}


# No fault may use up a job's attempts: what ends badly here must end badly for a reason of its own.
_PATIENT = {
    "TUNEPOOL_MAX_ATTEMPTS": "15",
    "TUNEPOOL_LEASE_SECONDS": lease(2),
    "TUNEPOOL_SWEEP_SECONDS": "0.5",
    "TUNEPOOL_STOP_SECONDS": lease(2),
    "TUNEPOOL_STALL_FLOOR_SECONDS": lease(4),
    "TUNEPOOL_BACKOFF_BASE_SECONDS": "0.1",
    "TUNEPOOL_BACKOFF_CAP_SECONDS": "0.3",
}


@contextmanager
def make_world(folder: Path, cluster: Path) -> Iterator[World]:
    """Servers, proxies, a worker, two janitors."""
    with (
        own_servers(folder, cluster) as servers,
        s3_server() as address,
        open_stack(folder / "stack", servers, **_PATIENT, **s3_environment(*address)) as stack,
    ):
        postgres = Proxy(servers.postgres.socket_dir / ".s.PGSQL.5432")
        bell, store = Proxy(servers.valkey.socket), Proxy(address)
        database = make_url(stack.settings.database_url).database
        environment = {
            "DATABASE_URL": f"postgresql+psycopg://postgres@127.0.0.1:{postgres.port}/{database}",
            "REDIS_URL": f"redis://127.0.0.1:{bell.port}/0",
            **s3_environment("127.0.0.1", store.port),
        }
        world = World(stack, {"postgres": postgres, "redis": bell, "store": store}, environment)
        try:
            yield world
        finally:
            world.heal()
            world.close()


class Worlds:
    """One world for many schedules; a new one after a break, so that every seed stands for itself."""

    def __init__(self, folder: Callable[[], Path], *, cluster: Path) -> None:
        self._folder, self._cluster = folder, cluster
        self._open = ExitStack()
        self._world: World | None = None

    def play(self, schedule: Schedule) -> list[str]:
        """What the schedule broke; empty when all is well."""
        if self._world is None:
            self._world = self._open.enter_context(make_world(self._folder(), self._cluster))
        try:
            broken = self._world.run(schedule)
        except TooSlow as stuck:
            broken = [str(stuck)]
        if broken:
            self.close()
        return broken

    def close(self) -> None:
        self._world = None
        self._open.close()
