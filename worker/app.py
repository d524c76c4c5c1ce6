"""The Celery door: `celery -A worker.app worker`. One main process that never works, and children that supervise.

Children die with the main process (PR_SET_PDEATHSIG, set by Celery), trainers with their supervisor.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from functools import cache
from typing import IO, Any

if gc.isenabled():
    # What imports make lives to the end: to look through it meanwhile is a quarter of the start. On again in `_arrive`.
    gc.disable()

import structlog
from celery import signals
from kombu import Exchange, Queue

from shared import log as logs
from shared.operating import tracing
from shared.operating.isolation import IsolationLacking, isolation
from shared.operating.secrecy import hide_secrets
from shared.settings import Settings
from shared.store.bell import make_celery, own_queue_name, queue_name
from worker.host.devices import discover
from worker.host.flags import LANES, SharedFlags
from worker.host.host import Host, children, identify, open_host
from worker.host.presence import HomeAlreadyServed, Presence, take_home
from worker.program import processes

log = structlog.get_logger()

settings = Settings()
flags = SharedFlags(devices=len(discover(settings)))
app = make_celery(settings)
app.conf.update(
    imports=("worker.tasks",),
    task_queues=[
        Queue(name, Exchange(name), routing_key=name)
        for name in (*(queue_name(lane, settings.pool) for lane in LANES), own_queue_name(identify(settings).id))
    ],
    worker_pool="prefork",
    worker_redirect_stdouts=False,
    worker_concurrency=children(len(discover(settings))),
    # Supervisors are small and the libraries under them leak little; a fresh one now and then costs nothing.
    worker_max_tasks_per_child=200,
)


@cache
def this_host() -> Host:
    """This child's own connections."""
    return open_host(settings, flags=flags)


class _Main:
    """What only the main process has, and its number, by which children know whether it lives."""

    pid: int = 0
    lock: IO[str] | None = None
    presence: Presence | None = None
    deaf: int = 0  # how to end when we went deaf; 0 otherwise


@signals.worker_init.connect
def _arrive(**_: Any) -> None:
    gc.freeze()  # worker.tasks is imported, too; children that are forked from here share it all
    gc.enable()
    _Main.pid = os.getpid()
    logs.configure(settings)
    hide_secrets()  # and those of the children that are forked from here
    try:
        _Main.lock = take_home(settings.home.resolve())
    except HomeAlreadyServed as error:
        log.error("worker.refused", reason=str(error))
        sys.exit(1)
    tracing.look()  # the children make them; what is wrong is said now
    _look_at_the_walls()


def _look_at_the_walls() -> None:
    """Once, before the children are forked: they inherit what was measured."""
    try:
        given = isolation(settings)
    except IsolationLacking as error:
        log.error("worker.refused", reason=str(error))
        sys.exit(1)
    log.info("worker.isolation", **given.document())
    if given.off or given.lacking:
        log.warning("worker.isolation_lacking", lacking=list(given.lacking) or [given.line])


@signals.worker_ready.connect
def _ready(**_: Any) -> None:
    _Main.presence = Presence(settings, flags, children=app.conf.worker_concurrency, on_deaf=_exit_deaf)
    _Main.presence.start()


def _exit_deaf(code: int) -> None:
    # Attempts drain first. A consumer that has gone deaf may not hear its own shutdown either, hence the end by force.
    _Main.deaf = code
    flags.drain()
    last = threading.Timer(2 * settings.stop_seconds + 60, os._exit, [code])
    last.daemon = True
    last.start()
    os.kill(os.getpid(), signal.SIGTERM)


@signals.worker_shutting_down.connect
def _drain(**_: Any) -> None:
    flags.drain()
    flags.ring_seats()
    if _Main.presence is not None:
        _Main.presence.wake()


@signals.worker_shutdown.connect
def _leave(**_: Any) -> None:
    if _Main.presence is not None:
        _Main.presence.stop()
    if _Main.deaf:
        os._exit(_Main.deaf)  # Celery would end in 0, and who starts us again only after failures would not


@signals.worker_process_init.connect
def _begin_child(**_: Any) -> None:
    # Celery has asked for our death with its main process, and is not told of a death before that.
    processes.die_with_parent(_Main.pid)
    processes.adopt_strays()
    flags.begin(child=processes.child_number())
    this_host()


@signals.worker_process_shutdown.connect
def _end_child(**_: Any) -> None:
    tracing.close(tracing.WORKER)  # Celery ends its children without Python's own end
