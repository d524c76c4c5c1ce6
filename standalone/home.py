"""A home: the folder that holds everything one installation keeps on this host.

credentials.json   base URL and API key, for clients on this host
signing-secret     signs download links; the API makes it
secrets-key        encrypts the secrets that the database keeps; back it up beside the database
up.lock            held by the running `up`, with its process id
logs/              one file per child
postgres/          the database; when root starts it below a folder that Postgres' user may not enter, `data-location`
                   names a folder under /var/lib/tunepool/data that belongs to this home: back it up, or delete it, too
valkey/            the queue's bell; may be deleted while nothing runs
storage/ cache/ work/   objects, base models, attempts: when no STORAGE_URL says otherwise
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


class HomeInUse(RuntimeError):
    """Another `up` holds this home."""


class HomeUnusable(RuntimeError):
    """We may not write here."""


@dataclass(frozen=True)
class Home:
    """Paths below a home, and its few files."""

    path: Path

    @property
    def credentials(self) -> Path:
        return self.path / "credentials.json"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def postgres(self) -> Path:
        return self.path / "postgres"

    @property
    def valkey(self) -> Path:
        return self.path / "valkey"

    def prepare(self) -> None:
        """Make it, if it is not there. Raises HomeUnusable."""
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            # Others' data and words; the home itself is entered. Where the store is elsewhere there is no `storage`.
            for private in (self.logs, self.path / "storage"):
                with suppress(PermissionError, FileNotFoundError):  # another user's: said below
                    private.chmod(0o700)
        except OSError as error:
            raise HomeUnusable(f"No home can be made at {self.path}: {error}. Choose another with --home.") from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise HomeUnusable(f"{self.path} belongs to another user. Choose another home with --home.")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Only one `up` at a time. The kernel lets go when this process ends, however it ends. Raises HomeInUse."""
        with (self.path / "up.lock").open("a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                raise HomeInUse(
                    f"'tunepool-server up' already runs in {self.path} (process {lock.read().strip()})."
                ) from error
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def known_key(self) -> str:
        """The API key of an earlier start; empty when there is none, or the file makes no sense."""
        return str(self._saved().get("api_key", ""))

    @property
    def last_port(self) -> int | None:
        """The API's port at the last start; None when there was none."""
        with suppress(ValueError):
            return urlsplit(str(self._saved().get("base_url", ""))).port
        return None

    def _saved(self) -> dict[str, Any]:
        try:
            saved: Any = json.loads(self.credentials.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return saved if isinstance(saved, dict) else {}

    def make_secrets_key(self) -> None:
        """Make the key that encrypts stored secrets, unless there is one: what it has encrypted, no other opens."""
        with suppress(FileExistsError):
            descriptor = os.open(self.path / "secrets-key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(base64.urlsafe_b64encode(os.urandom(32)))

    def secrets_key(self) -> str:
        """The key that `up` made here; empty when it has not."""
        with suppress(FileNotFoundError):
            return (self.path / "secrets-key").read_text(encoding="ascii")
        return ""

    def worker_beats(self, seconds: float) -> bool:
        """Whether the worker of this home has been heard of within so many seconds (worker/pulse.py)."""
        with suppress(FileNotFoundError):
            return time.time() - (self.path / "worker.pulse").stat().st_mtime <= seconds
        return False

    def write_credentials(self, *, base_url: str, api_key: str) -> None:
        write_private(self.credentials, json.dumps({"base_url": base_url, "api_key": api_key}, indent=2) + "\n")


def write_private(file: Path, text: str) -> None:
    """Replace a file whole, readable by its owner alone from the first byte."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as target:
        target.write(text)
    partial.replace(file)
