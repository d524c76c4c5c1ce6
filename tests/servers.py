"""Fixtures for real servers: Postgres and Valkey from their wheels, on their own sockets, as root or not.

A cluster is made once for all processes of the suite: `initdb`, and the schema by the real migrations. A server begins
with a copy of it, and each module gets a copy of the template in it (120 ms).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Engine

from shared.store.db import make_engine
from standalone.postgres import DATABASE, EmbeddedPostgres
from standalone.valkey import EmbeddedValkey
from tests import moves

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = "migrated"


def alembic_config(url: str) -> Config:
    config = Config(toml_file=ROOT / "pyproject.toml")
    config.cmd_opts = None
    config.attributes["url"] = url
    return config


@pytest.fixture(scope="session")
def migrated_cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of a server that was stopped; in them are our database, migrated, and a template of it."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    made = shared / "cluster"
    with (shared / "cluster.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # the first process makes it, the others wait
        if not made.exists():
            _make_cluster(made)
    return made


def _make_cluster(place: Path) -> None:
    with open_folder() as folder:
        server = EmbeddedPostgres(folder, durable=False)
        server.start()
        try:
            make_template(server)
        finally:
            server.stop()
        partial = place.with_name("cluster.partial")
        shutil.rmtree(partial, ignore_errors=True)
        _copy(folder / "data", partial)
        partial.rename(place)


def begin_with(cluster: Path, folder: Path) -> None:
    """Let a server whose folder this is find the data of `cluster` there, as if it had been started before."""
    folder.mkdir(parents=True, exist_ok=True)
    _copy(cluster, folder / "data")


def _copy(data: Path, place: Path) -> None:
    subprocess.run(["cp", "-a", data, place], check=True)  # as root with its owner, which Python's copies forget


@pytest.fixture(scope="session")
def postgres_server(migrated_cluster: Path) -> Iterator[EmbeddedPostgres]:
    """A server that trades crash safety for speed; tests of durability start their own."""
    with open_folder() as folder:
        begin_with(migrated_cluster, folder)
        server = EmbeddedPostgres(folder, durable=False)
        server.start()
        yield server
        server.destroy()


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter and nobody list; pytest's own let nobody through, not even Postgres' user."""
    folder = Path(tempfile.mkdtemp(prefix="tp-test-", dir="/tmp"))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_template(server: EmbeddedPostgres) -> None:
    """The schema by the real migrations, and a copy of it with the watch on jobs' moves that the invariants ask."""
    command.upgrade(alembic_config(server.url()), "head")
    with _admin(server) as admin:
        admin.execute(f"create database {TEMPLATE} template {DATABASE}")
    with psycopg.connect(f"host={server.socket_dir} user=postgres dbname={TEMPLATE}", autocommit=True) as template:
        template.execute(moves.WATCH)


@pytest.fixture(scope="module")
def database_url(postgres_server: EmbeddedPostgres) -> Iterator[str]:
    """A fresh, migrated database for the tests of one module."""
    name = f"t{uuid.uuid4().hex[:12]}"
    with _admin(postgres_server) as admin:
        admin.execute(f"create database {name} template {TEMPLATE}")
    yield postgres_server.url(name)
    with _admin(postgres_server) as admin:
        admin.execute(f"drop database {name} with (force)")


@pytest.fixture(scope="module")
def engine(database_url: str) -> Iterator[Engine]:
    made = make_engine(database_url)
    yield made
    made.dispose()


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    server = EmbeddedValkey(tmp_path_factory.mktemp("valkey"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_url(valkey_server: EmbeddedValkey) -> str:
    return valkey_server.url


def _admin(server: EmbeddedPostgres) -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(f"host={server.socket_dir} user=postgres dbname=postgres", autocommit=True)
