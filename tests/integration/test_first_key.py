"""A migrated database that nobody has used yet yields its first key by one command."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, select

from shared.store.db import session_scope
from shared.store.tables import OrganizationRow, ProjectRow
from shared.tenants import keys
from tests.forked import run_forked
from tests.patience import patience


def create(url: str, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "standalone.main", "keys", "create", "--home", str(home), *words]
    return run_forked(command, environment={**os.environ, "DATABASE_URL": url}, seconds=patience(60))


@pytest.fixture(autouse=True)
def empty(engine: Engine) -> None:
    """As after `migrate`: the tables, and nothing in them."""
    with engine.begin() as connection:
        connection.exec_driver_sql("truncate organizations cascade")


def count(engine: Engine, row: type[OrganizationRow | ProjectRow]) -> int | None:
    with session_scope(engine) as session:
        return session.scalar(select(func.count()).select_from(row))


def test_the_first_key_comes_with_a_project_and_may_do_everything(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    made = create(database_url, tmp_path)

    assert made.returncode == 0, made.stderr
    with session_scope(engine) as session:
        caller = keys.authenticate(session, made.stdout.strip())
        project = session.get_one(ProjectRow, caller.project_id)
        assert project.name == "default"
        assert session.get_one(OrganizationRow, project.organization_id).name == "default"
    assert caller.scopes == frozenset(keys.EVERYTHING)
    assert project.id in made.stderr


def test_the_second_key_shares_the_project_and_is_no_administrators(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    first, second = create(database_url, tmp_path).stdout.strip(), create(database_url, tmp_path).stdout.strip()

    with session_scope(engine) as session:
        ours, theirs = keys.authenticate(session, first), keys.authenticate(session, second)
    assert ours.project_id == theirs.project_id
    assert theirs.scopes == {"*"}
    assert (count(engine, OrganizationRow), count(engine, ProjectRow)) == (1, 1)


def test_the_first_key_has_the_scopes_that_were_asked_for(engine: Engine, database_url: str, tmp_path: Path) -> None:
    secret = create(database_url, tmp_path, "--scope", "jobs:read").stdout.strip()

    with session_scope(engine) as session:
        assert keys.authenticate(session, secret).scopes == {"jobs:read"}


def test_a_project_that_is_named_and_missing_is_not_made(engine: Engine, database_url: str, tmp_path: Path) -> None:
    refused = create(database_url, tmp_path, "--project", "proj_none")

    assert refused.returncode == 2
    assert "No project 'proj_none'" in refused.stderr
    assert count(engine, ProjectRow) == 0


def test_two_first_keys_at_once_make_one_project(engine: Engine, database_url: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: create(database_url, tmp_path), range(2)))

    assert [done.returncode for done in made] == [0, 0]
    assert (count(engine, OrganizationRow), count(engine, ProjectRow)) == (1, 1)
