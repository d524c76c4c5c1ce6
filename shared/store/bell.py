"""The bell: a Celery message says only "this lane of this pool may have work". Losing one loses no job."""

from __future__ import annotations

import time
from threading import Lock
from typing import Final

import structlog
from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from shared.settings import Settings
from shared.store.lifecycle import Lane

log = structlog.get_logger()

TASKS: dict[Lane, str] = {"training": "training.pull", "cpu": "cpu.pull"}
BREAKER_FAILURES = 3
BREAKER_SECONDS = 10.0
RING_EXPIRES_SECONDS = 30


def own_queue_name(worker_id: str) -> str:
    """The Redis list that only this worker hears: one that is to take part in an attempt is rung by name."""
    return f"training.of.{worker_id}"


def plain_url(url: str) -> str:
    """kombu's name for a socket URL, as redis-py spells it. Pure."""
    return url.replace("redis+socket://", "unix://", 1)


def queue_name(lane: Lane, pool: str) -> str:
    """The Redis list of a lane. Checks and other short work know no pool: any CPU lane takes them."""
    return f"training.{pool}" if lane == "training" else "cpu"


def make_celery(settings: Settings, *, timeout_seconds: float = 5.0) -> Celery:
    """A Celery app with every option set for a bell. Reasons beside each; measurements in docs/adr/0002."""
    app = Celery("tunepool", broker=settings.redis_url, set_as_current=False)
    app.conf.update(
        # State lives in Postgres; a result backend would be a second, worse copy of it.
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        # Messages carry a pool's name. JSON alone, so that write access to Redis is not code execution.
        task_serializer="json",
        accept_content=["json"],
        # Acknowledge at once: the lease in Postgres is ours, and Redis would redeliver anything that outlives
        # its visibility timeout.
        task_acks_late=False,
        # Without this a worker reserves one more message behind an hours-long job.
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        # A Redis blip must not end a ten-hour attempt.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_pool_limit=4,
        broker_pool_acquire_timeout=2,
        broker_transport_options={
            "visibility_timeout": 3600,
            # A hung Redis blocks a publisher for ever without these.
            "socket_timeout": timeout_seconds,
            "socket_connect_timeout": min(timeout_seconds, 2.0),
            "socket_keepalive": True,
            "health_check_interval": 25,
            "global_keyprefix": "tunepool:",
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
        },
    )
    return app


class Bell:
    """Rings within a budget; after three failures it stays silent for ten seconds. Never raises, never blocks long."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._app = make_celery(settings, timeout_seconds=settings.ring_seconds)
        # `retry=False` does not reach kombu's connecting, which would try three times with 6 s of sleep between.
        self._app.conf.broker_transport_options = {**self._app.conf.broker_transport_options, "max_retries": 0}
        self._lock = Lock()
        self._failures = 0
        self._silent_until = 0.0

    def ring(self, lane: Lane, pool: str | None = None, worker_id: str | None = None) -> bool:
        """Wake a worker of the lane, or this one; False when the message did not go out (the sweep rings again)."""
        if not self._settings.redis_url or time.monotonic() < self._silent_until:
            return False
        pool = pool or self._settings.pool
        try:
            self._app.send_task(
                TASKS[lane],
                args=[pool],
                queue=queue_name(lane, pool) if worker_id is None else own_queue_name(worker_id),
                expires=RING_EXPIRES_SECONDS,
                ignore_result=True,
                retry=False,
            )
        except (OperationalError, RedisError, OSError) as error:
            self._failed(error)
            return False
        self._failures = 0
        return True

    def answers(self) -> bool:
        """Whether Redis answers a ping within the budget."""
        if not self._settings.redis_url:
            return False
        try:
            with self._app.connection_for_write() as connection:
                connection.default_channel.client.ping()
        except (OperationalError, RedisError, OSError):
            return False
        return True

    def _failed(self, error: Exception) -> None:
        with self._lock:
            self._failures += 1
            if self._failures >= BREAKER_FAILURES:
                self._silent_until = time.monotonic() + BREAKER_SECONDS
                self._failures = 0
        log.warning("bell.unheard", error=str(error)[:200])


_BELLS: Final[dict[tuple[str, float, str], Bell]] = {}  # one per process and Redis: its breaker must be shared


def _bell(settings: Settings) -> Bell:
    key = (settings.redis_url, settings.ring_seconds, settings.pool)
    if key not in _BELLS:
        _BELLS[key] = Bell(settings)
    return _BELLS[key]


def ring(lane: Lane, settings: Settings, *, pool: str | None = None) -> bool:
    """Ring the process's bell. Call it after a commit, never inside a transaction."""
    return _bell(settings).ring(lane, pool)


def call(worker_id: str, settings: Settings, *, pool: str | None = None, lane: Lane = "training") -> bool:
    """Ring for one worker, as for one that is to take part in an attempt. After a commit, as `ring`."""
    return _bell(settings).ring(lane, pool, worker_id)


def answers(settings: Settings) -> bool:
    """Whether the bell's Redis answers. Only the time until a worker looks depends on it."""
    return _bell(settings).answers()
