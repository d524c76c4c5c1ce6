"""Fixtures for real servers: Postgres and Valkey from their wheels, on their own sockets, as root or not.

The schema is built once, by the real migrations, into a template; each module gets a copy of it (120 ms).
"""

from __future__ import annotations

import shutil
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
from standalone.postgres import EmbeddedPostgres
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
def postgres_server() -> Iterator[EmbeddedPostgres]:
    """A server that trades crash safety for speed; tests of durability start their own."""
    with open_folder() as folder:
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


@pytest.fixture(scope="session")
def migrated_template(postgres_server: EmbeddedPostgres) -> str:
    make_template(postgres_server)
    return TEMPLATE


def make_template(server: EmbeddedPostgres) -> None:
    """The schema by the real migrations, and the watch on jobs' moves that the invariants ask."""
    with _admin(server) as admin:
        admin.execute(f"create database {TEMPLATE}")
    command.upgrade(alembic_config(server.url(TEMPLATE)), "head")
    with psycopg.connect(f"host={server.socket_dir} user=postgres dbname={TEMPLATE}", autocommit=True) as template:
        template.execute(moves.WATCH)


@pytest.fixture(scope="module")
def database_url(postgres_server: EmbeddedPostgres, migrated_template: str) -> Iterator[str]:
    """A fresh, migrated database for the tests of one module."""
    name = f"t{uuid.uuid4().hex[:12]}"
    with _admin(postgres_server) as admin:
        admin.execute(f"create database {name} template {migrated_template}")
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
