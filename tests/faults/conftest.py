"""Fault tests stand on the stack of the lifecycle tests; those that break servers have servers of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from alembic import command

from standalone.postgres import EmbeddedPostgres
from standalone.valkey import EmbeddedValkey
from tests.lifecycle.conftest import servers, stack  # noqa: F401  # fixtures
from tests.lifecycle.stack import Servers, Stack, make_stack
from tests.servers import TEMPLATE, alembic_config


@pytest.fixture
def own_stack(tmp_path: Path) -> Iterator[Stack]:
    """A stack whose Postgres and Valkey the test may stop and kill."""
    postgres, valkey = EmbeddedPostgres(tmp_path / "postgres"), EmbeddedValkey(tmp_path / "valkey")
    postgres.start()
    valkey.start()
    with postgres_admin(postgres) as admin:
        admin.execute(f"create database {TEMPLATE}")
    command.upgrade(alembic_config(postgres.url(TEMPLATE)), "head")
    made = make_stack(tmp_path / "stack", Servers(postgres, valkey, TEMPLATE))
    yield made
    made.stop()
    valkey.stop()
    postgres.stop()
    assert made.trainers() == [], "a trainer outlived its worker"


def postgres_admin(server: EmbeddedPostgres) -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(f"host={server.socket_dir} user=postgres dbname=postgres", autocommit=True)
