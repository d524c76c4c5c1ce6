"""A home: the folder that holds everything one installation keeps on this host."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class HomeInUse(RuntimeError):
    """Another `up` holds this home."""


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

    def prepare(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)

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

    def signing_secret(self) -> str:
        """Signs download links; made at the first start."""
        file = self.path / "signing-secret"
        if not file.exists():
            write_private(file, secrets.token_urlsafe(32))
        return file.read_text(encoding="utf-8")

    def read_credentials(self) -> dict[str, Any]:
        if not self.credentials.exists():
            return {}
        found: dict[str, Any] = json.loads(self.credentials.read_text(encoding="utf-8"))
        return found

    def write_credentials(self, *, base_url: str, api_key: str) -> None:
        write_private(self.credentials, json.dumps({"base_url": base_url, "api_key": api_key}, indent=2) + "\n")


def write_private(file: Path, text: str) -> None:
    """Replace a file whole, readable by its owner alone from the first byte."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as target:
        target.write(text)
    partial.replace(file)
