"""Versions beside each other, and migrations that are killed (faults 51, 52)."""

from __future__ import annotations

import os
import random
import signal
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, pool, text, update
from sqlalchemy.orm import Session

from shared.chores import table as chores
from shared.jobs import moves
from shared.lease import lease as leasing
from shared.lease.values import Lease
from shared.settings import Settings, child_environment
from shared.store import schema
from shared.store.db import session_scope
from shared.store.tables import JobRow
from standalone.migrate import migrate
from standalone.postgres import EmbeddedPostgres
from tests.factories import make_caller
from tests.faults.conftest import api_process, make_secret, postgres_admin
from tests.forked import Forked, line_for
from tests.integration.test_leases import CASES
from tests.lifecycle.stack import Stack, until
from tests.patience import patience
from tests.servers import alembic_config

COLUMNS = """
    select table_name, column_name, data_type, is_nullable, column_default from information_schema.columns
    where table_schema = 'public' and table_name <> 'alembic_version' order by 1, 2"""
INDEXES = """
    select c.relname, i.indisvalid from pg_index i join pg_class c on c.oid = i.indexrelid
    where c.relnamespace = 'public'::regnamespace and c.relname not like 'alembic%' order by 1"""
# Every statement of a migration takes a little longer: time to break it in the middle.
SLOW = """
    create function slowly() returns event_trigger language plpgsql as $$ begin perform pg_sleep(0.04); end $$;
    create event trigger slowly on ddl_command_end execute function slowly()"""


@pytest.fixture
def empty(postgres_server: EmbeddedPostgres) -> Iterator[str]:
    """The URL of an empty database in which every change of the schema is slow."""
    name = f"u{uuid.uuid4().hex[:12]}"
    with postgres_admin(postgres_server) as admin:
        admin.execute(f"create database {name}")
    with postgres_admin(postgres_server, name) as admin:
        for statement in SLOW.split(";\n"):
            admin.execute(statement)
    yield postgres_server.url(name)
    with postgres_admin(postgres_server) as admin:
        admin.execute(f"drop database {name} with (force)")


def ask(url: str, query: str) -> list[tuple[Any, ...]]:
    with create_engine(url, poolclass=pool.NullPool).connect() as connection:
        return [tuple(row) for row in connection.execute(text(query))]


def tell(url: str, statement: str) -> None:
    with create_engine(url, poolclass=pool.NullPool).begin() as connection:
        connection.execute(text(statement))


def revision(url: str) -> str | None:
    known = ask(url, "select to_regclass('alembic_version')")[0][0]
    return next((row[0] for row in ask(url, "select version_num from alembic_version")), None) if known else None


def schemas(url: str) -> dict[str | None, tuple[list[Any], list[Any]]]:
    """What each revision has in columns and indexes; leaves the database empty again."""
    tell(url, "alter event trigger slowly disable")
    found = {None: (ask(url, COLUMNS), ask(url, INDEXES))}
    for name in schema.REVISIONS:
        command.upgrade(alembic_config(url), name)
        found[name] = (ask(url, COLUMNS), ask(url, INDEXES))
    command.downgrade(alembic_config(url), "base")
    tell(url, "alter event trigger slowly enable")
    return found


def start_migration(url: str) -> Forked:
    words = ["-m", "standalone.main", "migrate"]
    line = line_for(words, {})
    assert line is not None
    with Path(os.devnull).open("wb") as nobody:
        return line.start(words, environment=child_environment(DATABASE_URL=url), log=nobody.fileno())


def busy(url: str) -> bool:
    """Whether somebody changes the schema right now."""
    return bool(ask(url, "select from pg_stat_activity where datname = current_database() and wait_event = 'PgSleep'"))


def test_the_known_revisions_are_those_of_the_migrations() -> None:
    scripts = ScriptDirectory.from_config(alembic_config("")).walk_revisions()

    assert tuple(reversed([script.revision for script in scripts])) == schema.REVISIONS


def test_a_migration_that_is_killed_or_cut_off_leaves_one_revision_or_the_next_and_is_finished_by_another(
    empty: str,
) -> None:
    whole = schemas(empty)
    chance = random.Random(52)

    for how in ("cut", "kill"):
        command.downgrade(alembic_config(empty), "base")
        migration = start_migration(empty)
        until(lambda: busy(empty), what="a migration at work")
        time.sleep(chance.uniform(0.0, 0.5))
        if how == "kill":
            migration.send_signal(signal.SIGKILL)
        else:
            tell(
                empty,
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where datname = current_database() and pid <> pg_backend_pid()",
            )
        assert migration.wait(patience(30)) != 0
        until(lambda: not busy(empty), what="the end of its last statement")

        columns, _ = whole[revision(empty)]
        assert ask(empty, COLUMNS) == columns

    assert start_migration(empty).wait(patience(60)) == 0
    assert revision(empty) == schema.REVISIONS[-1]
    assert (ask(empty, COLUMNS), ask(empty, INDEXES)) == whole[schema.REVISIONS[-1]]


def test_an_index_whose_making_was_interrupted_is_made_again(empty: str) -> None:
    command.upgrade(alembic_config(empty), "0004_merges")
    engine = create_engine(empty, poolclass=pool.NullPool)
    with engine.connect() as blocker:
        blocker.execute(text("lock table jobs in row exclusive mode"))  # a submission that takes longer than 4 s
        migration = start_migration(empty)
        assert migration.wait(patience(60)) != 0
    assert [name for name, valid in ask(empty, INDEXES) if not valid] == ["ix_jobs_without_metadata"]

    migrate(empty)

    assert [name for name, valid in ask(empty, INDEXES) if not valid] == []


def test_hosts_that_start_together_migrate_once_and_all_succeed_though_the_first_is_killed(empty: str) -> None:
    first = start_migration(empty)
    until(lambda: busy(empty), what="a migration at work")
    others = [start_migration(empty) for _ in range(2)]
    time.sleep(0.3)
    first.kill()

    assert [other.wait(patience(60)) for other in others] == [0, 0]
    assert first.wait(patience(10)) != 0
    assert revision(empty) == schema.REVISIONS[-1]


# --- versions side by side -------------------------------------------------------------------------------------------


def set_revision(stack: Stack, name: str) -> None:
    with session_scope(stack.engine) as session:
        session.execute(text("update alembic_version set version_num = :name"), {"name": name})


def test_a_new_version_waits_for_its_migration_and_says_so(stack: Stack) -> None:
    set_revision(stack, schema.REVISIONS[-2])
    stack.start_worker()
    janitor = stack.start_janitor()
    with api_process(stack) as url:
        refused = httpx2.get(f"{url}/readyz", timeout=patience(20))
        for name in ("worker-home", "janitor"):
            log = stack.home / f"{name}.log"
            until(lambda log=log: "tunepool-server migrate" in log.read_text(), what="a refusal with its remedy")
        job_id = stack.submit("steps=2")

        set_revision(stack, schema.REVISIONS[-1])

        assert stack.wait(job_id).status == "succeeded"
        # It looks once a second at most, and all this may be done in one.
        until(lambda: httpx2.get(f"{url}/readyz", timeout=patience(20)).status_code == 200, what="a ready API")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "schema_outdated"
    assert janitor.poll() is None


def test_an_old_version_serves_on_the_schema_of_a_newer_one_and_leaves_it_alone(stack: Stack) -> None:
    set_revision(stack, "9999_later")

    migrate(stack.settings.database_url)

    with Session(stack.engine) as session:
        schema.must_serve(session)
        assert session.scalar(text("select version_num from alembic_version")) == "9999_later"


def test_jobs_of_a_newer_version_are_shown_and_left_to_it_and_hold_up_nobody(stack: Stack) -> None:
    unchecked, queued = stack.submit("steps=2"), stack.submit("steps=2")
    with session_scope(stack.engine) as session:  # the file of one is checked, its request is beyond us
        later = {**session.get_one(JobRow, unchecked).request, "invented_later": 1}
        session.execute(update(JobRow).where(JobRow.id == unchecked).values(request=later))
        session.execute(text("insert into pools (name, held) values (:name, true)"), {"name": stack.settings.pool})
    stack.start_worker()
    stack.start_janitor()
    stack.wait(queued, "queued")
    with session_scope(stack.engine) as session:
        spec = session.get_one(JobRow, queued).spec
        later = {**spec, "training": {**spec["training"], "invented_later": 2}}
        session.execute(update(JobRow).where(JobRow.id == queued).values(spec=later))
        session.execute(text("update pools set held = false"))

    assert stack.wait(stack.submit("steps=2")).status == "succeeded"

    assert [stack.job(job_id).status for job_id in (unchecked, queued)] == ["validating_files", "queued"]
    assert [stack.job(job_id).failures for job_id in (unchecked, queued)] == [0, 0]
    assert (stack.home / "worker-home.log").read_text().count("job.not_understood") >= 2
    headers = {"Authorization": f"Bearer {make_secret(stack)}"}
    with api_process(stack) as url, httpx2.Client(base_url=url, headers=headers, timeout=patience(20)) as http:
        listed = http.get("/v1/fine_tuning/jobs")
        shown = [http.get(f"/v1/fine_tuning/jobs/{job_id}") for job_id in (unchecked, queued)]
    assert [answer.status_code for answer in (listed, *shown)] == [200, 200, 200]
    assert len(listed.json()["data"]) == 3
    assert stack.broken_invariants() == []


@dataclass(frozen=True)
class Before:
    """How the version before 0008_leases leases one kind of work and ends it, in its own statements."""

    table: str
    waits: str
    taken: str
    fence: str
    until: str
    ended: str

    def take(self, session: Session, *, seconds: int = 60) -> tuple[str, int] | None:
        free = f"{self.until} is null or {self.until} < now()"
        row = session.execute(
            text(
                f"update {self.table} set {self.taken}, {self.fence} = {self.fence} + 1,"  # noqa: S608
                f" {self.until} = clock_timestamp() + make_interval(secs => {seconds}) where id = (select id from"
                f" {self.table} where {self.waits} and ({free}) order by id limit 1 for update skip locked)"
                f" returning id, {self.fence}"
            )
        ).one_or_none()
        return None if row is None else (row[0], row[1])

    def end(self, session: Session, row_id: str, fence: int) -> bool:
        done = session.execute(
            text(
                f"update {self.table} set {self.ended}, {self.until} = null"  # noqa: S608
                f" where id = :id and {self.fence} = :fence and {self.waits} returning id"
            ),
            {"id": row_id, "fence": fence},
        )
        return done.one_or_none() is not None


BEFORE = {
    "file_check": Before(
        "files",
        "status = 'uploaded' and deleted_at is null",
        "status = 'uploaded'",
        "check_attempts",
        "check_until",
        "status = 'processed'",
    ),
    "preflight": Before(
        "preflights",
        "status in ('queued','running')",
        "status = 'running'",
        "checker",
        "check_until",
        "status = 'failed', finished_at = now()",
    ),
    "merge": Before(
        "merges",
        "status in ('queued','running') and deleted_at is null",
        "status = 'running', failures = failures + 1, lease_owner = 'older'",
        "fence",
        "lease_until",
        "status = 'failed', finished_at = now()",
    ),
    "job": Before(
        "jobs",
        "status = 'validating_files'",
        "lease_owner = 'older'",
        "fence",
        "lease_until",
        "status = 'queued'",
    ),
}


@pytest.mark.parametrize("name", BEFORE)
def test_the_version_before_and_this_one_never_work_on_one_row_together(session: Session, name: str) -> None:
    before, case = BEFORE[name], CASES[name]
    session.execute(text(f"update {before.table} set {before.ended}, {before.until} = null where {before.waits}"))  # noqa: S608
    row_id = case.make(session, make_caller(session))

    def take(*, seconds: float = 60) -> Lease | None:
        row = leasing.take(session, case.kind, worker_id="newer", lease_seconds=seconds)
        return None if row is None else case.kind.lease(row)

    older = before.take(session)
    assert older == (row_id, 1)
    assert take() is None, "the older version has it"
    session.execute(text(f"update {before.table} set {before.until} = '1970-01-01' where id = '{row_id}'"))  # noqa: S608
    chores.reap(session, grace_seconds=5)
    moves.reap(session, settings=Settings(grace_seconds=5))
    newer = take(seconds=-1)
    assert newer is not None
    assert not before.end(session, *older), "it was thought dead"
    again = before.take(session) if name != "job" else None  # jobs wait for the reaper in both versions
    if again is not None:
        assert not leasing.end(session, case.kind, newer), "it was thought dead"
        assert before.end(session, *again)
