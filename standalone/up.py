"""`tunepool-server up`: Postgres, Valkey, API, worker and janitor on this machine, from nothing."""

from __future__ import annotations

import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

import structlog

from shared import keys
from shared.db import make_engine, session_scope
from shared.settings import Settings, child_environment
from standalone.home import Home
from standalone.migrate import migrate
from standalone.postgres import EmbeddedPostgres
from standalone.processes import Child, Stack
from standalone.valkey import EmbeddedValkey

log = structlog.get_logger()

WORKER: Final = ("celery", "-A", "worker.app", "worker", "--loglevel=WARNING", "--without-gossip", "--without-mingle")


class PortTaken(RuntimeError):
    """The API's port belongs to somebody else."""


@contextmanager
def servers(home: Home, settings: Settings) -> Iterator[dict[str, str]]:
    """Postgres and Valkey of our own, but for those that the environment names; yields the children's environment."""
    with ExitStack() as ending:
        database_url, redis_url = settings.database_url, settings.redis_url
        if not database_url:
            postgres = EmbeddedPostgres(home.path / "postgres")
            postgres.start()
            ending.callback(postgres.stop)
            database_url = postgres.url()
        if not redis_url:
            valkey = EmbeddedValkey(home.path / "valkey")
            valkey.start()
            ending.callback(valkey.stop)
            redis_url = valkey.url
        yield child_environment(
            DATABASE_URL=database_url,
            REDIS_URL=redis_url,
            STORAGE_URL=settings.storage,
            TUNEPOOL_HOME=str(home.path),
            TUNEPOOL_SIGNING_SECRET=settings.signing_secret.get_secret_value() or home.signing_secret(),
        )


def free_port(wanted: int) -> int:
    """`wanted`, or any free one for 0. Raises PortTaken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise PortTaken(
                f"Port {wanted} of 127.0.0.1 is in use. Choose another with --port, or --port 0 for any."
            ) from error
        port: int = probe.getsockname()[1]
        return port


def first_key(database_url: str) -> str | None:
    """On a first start, the secret of the key that was made."""
    engine = make_engine(database_url)
    try:
        with session_scope(engine) as session:
            return keys.ensure_default(session)
    finally:
        engine.dispose()


def run(home: Home, settings: Settings, *, port: int, with_worker: bool) -> None:
    """Everything, until SIGINT or SIGTERM. Raises HomeInUse, PortTaken, ChildFailed, PostgresFailed, ValkeyFailed."""
    begun = time.monotonic()
    home.prepare()
    stack = Stack(home.logs)
    stack.listen()
    with home.held():
        port = free_port(port)
        with servers(home, settings) as environment:
            migrate(environment["DATABASE_URL"])
            api_key = first_key(environment["DATABASE_URL"]) or home.read_credentials().get("api_key", "")
            base_url = f"http://127.0.0.1:{port}/v1"
            try:
                for child in children(environment, port=port, with_worker=with_worker):
                    if not stack.ending:
                        stack.start(child)
                home.write_credentials(base_url=base_url, api_key=api_key)
                if not stack.ending:
                    print(
                        f"ready  {base_url}  key in {home.credentials}  ({time.monotonic() - begun:.1f} s)", flush=True
                    )
                stack.watch()
                print("stopping", flush=True)
            finally:
                stack.stop()


def children(environment: dict[str, str], *, port: int, with_worker: bool) -> Iterator[Child]:
    """Our processes in the order they start."""
    yield Child("api", api_command("127.0.0.1", port), environment, ready=answers(port), stop_seconds=8)
    yield Child("janitor", module("worker.janitor"), environment, stop_seconds=5)
    if with_worker:
        # Drains: the trainer saves a checkpoint and its job waits for the next start.
        yield Child("worker", module(*WORKER), environment, stop_seconds=60)


def module(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]


def api_command(host: str, port: int) -> list[str]:
    return module(
        *("uvicorn", "--factory", "api.app:app_from_settings", "--host", host, "--port", str(port)),
        *("--no-access-log", "--no-server-header", "--log-level", "warning", "--timeout-graceful-shutdown", "5"),
    )


def answers(port: int) -> Callable[[], bool]:
    """Whether the API on this port says that it lives."""

    def ask() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=2) as reply:  # our own URL
                return bool(reply.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    return ask
