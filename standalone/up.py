"""`tunepool-server up`: Postgres, Valkey, API, worker and janitor on this machine, from nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final

from pydantic import SecretStr

from shared.operating.isolation import isolation
from shared.settings import Settings, child_environment
from standalone.children import Child
from standalone.first_key import signing_key, working_key
from standalone.home import Home
from standalone.migrate import migrate
from standalone.postgres import EmbeddedPostgres
from standalone.processes import Stack, StopRequested
from standalone.valkey import EmbeddedValkey

WORKER: Final = (
    *("celery", "-A", "worker.app", "worker", "--loglevel=WARNING"),
    *("--without-gossip", "--without-mingle", "--without-heartbeat"),
)
PLAYGROUND: Final = ("worker.chores.playground_queue",)
DISPATCHER: Final = ("worker.attempt.dispatcher",)
HANDED_OVER: Final = ("worker.attempt.handed_over",)


class PortTaken(RuntimeError):
    """The API's port belongs to somebody else."""


@dataclass(frozen=True)
class Up:
    """One run of everything in one home."""

    home: Home
    settings: Settings
    port: int
    with_worker: bool
    stack: Stack
    leaving: ExitStack  # what is tidied once no child lives

    def bring_up(self) -> None:
        """Returns when clients can come. Raises ChildFailed, Stopped; `stack.stop` ends what runs by then."""
        self.home.make_secrets_key()
        environment = own_environment(
            self.home,
            self.settings,
            DATABASE_URL=self.settings.database_url or self._postgres(),
            REDIS_URL=self.settings.redis_url or self._valkey(),
        )
        migrate(environment["DATABASE_URL"])
        signing_key(environment["DATABASE_URL"], with_secrets_key(self.home, self.settings))
        self._tell_credentials(environment["DATABASE_URL"])
        for child in self._children(environment):
            self.stack.start(child)

    def _postgres(self) -> str:
        postgres = EmbeddedPostgres(self.home.postgres, log=self.home.logs / "postgres.log")
        self.leaving.callback(postgres.forget_sockets)
        self.stack.start(postgres.child())
        postgres.make_database()
        return postgres.url()

    def _valkey(self) -> str:
        valkey = EmbeddedValkey(self.home.valkey, log=self.home.logs / "valkey.log")
        self.leaving.callback(valkey.forget_sockets)
        self.stack.start(valkey.child())
        return valkey.url

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def _tell_credentials(self, database_url: str) -> None:
        ours = not self.settings.database_url
        key = working_key(database_url, known=self.home.known_key(), ours=ours)
        # At once: a key that is made and told to nobody is lost.
        self.home.write_credentials(base_url=self.base_url, api_key=key)
        if not key:
            say("No API key of this database is known here; make one with: tunepool-server keys create")

    def _children(self, environment: dict[str, str]) -> Iterator[Child]:
        """Our processes in the order they start."""
        yield self._child(
            "api",
            api_command("127.0.0.1", self.port, processes=self.settings.api_processes),
            environment,
            ready=answers(self.port),
        )
        yield self._child("janitor", module("worker.janitor"), environment)
        if self.with_worker:
            yield self._worker(environment)
            yield self._child("playground", module(*PLAYGROUND), environment)
        if self.settings.launcher != "local":
            yield self._child("dispatcher", module(*DISPATCHER), environment)

    def _worker(self, environment: dict[str, str]) -> Child:
        # Asked, it drains: the trainer saves a checkpoint and its job waits for the next start. When we are killed,
        # Postgres ends with us: a drain would wait for it in vain and keep the home from the next worker. The lease
        # brings the job back.
        return replace(
            self._child("worker", module(*WORKER), environment),
            stop_seconds=self.settings.stop_seconds + 30,
            last_word=signal.SIGKILL,
        )

    def _child(
        self,
        name: str,
        argv: list[str],
        environment: dict[str, str],
        *,
        ready: Callable[[], bool] = lambda: True,
    ) -> Child:
        return Child(
            name=name,
            argv=argv,
            environment=environment,
            log=self.home.logs / f"{name}.log",
            cwd=self.home.path,
            ready=ready,
        )


def run(home: Home, settings: Settings, *, port: int, with_worker: bool) -> None:
    """Everything, until SIGINT or SIGTERM. Raises HomeInUse, HomeUnusable, PortTaken, ChildFailed, IsolationLacking."""
    begun = time.monotonic()
    stack = Stack()
    stack.listen()
    home.prepare()
    with home.held(), ExitStack() as leaving:
        if with_worker:
            isolation(settings)  # better now than when all but the worker runs
        up = Up(home, settings, free_port(port), with_worker, stack, leaving)
        try:
            with contextlib.suppress(StopRequested):
                up.bring_up()
                walls = f"  {isolation(settings).line}" if with_worker else ""
                say(f"ready  {up.base_url}  key in {home.credentials}  ({time.monotonic() - begun:.1f} s){walls}")
                say(f"page   {up.base_url.removesuffix('/v1')}/ui  sign in with that key")
                stack.watch()
            say("stopping")
        finally:
            stack.stop(say)


def say(line: str) -> None:
    """Tell the operator. A closed terminal is no reason to skip the orderly end."""
    try:
        print(line, flush=True)
    except OSError:
        # What was not said stays in the buffer, and would fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def own_environment(home: Home, settings: Settings, **servers: str) -> dict[str, str]:
    """The environment of our processes. Paths are absolute: their working directory is not the operator's."""
    named = {
        "TUNEPOOL_MODELS_FILE": settings.models_file,
        "TUNEPOOL_PROVENANCE_KEY_FILE": settings.provenance_key_file,
    }
    paths = {name: str(path.resolve()) for name, path in named.items() if path is not None}
    return child_environment(
        STORAGE_URL=settings.storage,
        TUNEPOOL_HOME=str(home.path),
        TUNEPOOL_SECRETS_KEY=with_secrets_key(home, settings).secrets_key.get_secret_value(),
        **paths,
        **servers,
    )


def with_secrets_key(home: Home, settings: Settings) -> Settings:
    """The settings with the key that `up` made in this home, where the environment names none."""
    known = settings.secrets_key.get_secret_value() or home.secrets_key()
    return settings.model_copy(update={"secrets_key": SecretStr(known)})


def free_port(wanted: int) -> int:
    """`wanted`, or any free one for 0. Raises PortTaken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
            probe.listen(1)  # two sockets may be bound to a port with SO_REUSEADDR; only one may listen
        except OSError as error:
            raise PortTaken(
                f"Port {wanted} of 127.0.0.1 cannot be had: {error.strerror}. "
                "Choose another with --port, or --port 0 for any."
            ) from error
        port: int = probe.getsockname()[1]
        return port


def module(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]


def api_command(host: str, port: int, *, processes: int) -> list[str]:
    return module(
        *("api.serve", "--factory", "api.app:app_from_settings", "--host", host, "--port", str(port)),
        *("--http", "api.bounded_head:BoundedHead"),
        *(("--workers", str(processes)) if processes > 1 else ()),
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
