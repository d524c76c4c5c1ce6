"""Migrates a database to this version's schema."""

from __future__ import annotations

import time
from pathlib import Path

import structlog
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, func, select

import shared
from shared.store.db import make_engine

log = structlog.get_logger()

# Any fixed number: hosts that start together take turns.
MIGRATION_LOCK = 7_365_119
TURN_SECONDS = 0.2


def migrate(url: str) -> None:
    """Run the missing migrations, under a lock. Safe at every start; the schema of a newer version is left as it is."""
    config = Config()
    # Beside our packages, wherever those are; a `%` in the path is Alembic's sign for interpolation.
    folder = Path(shared.__file__).parent.parent / "migrations"
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    engine = make_engine(url)
    try:
        with engine.connect() as lock:
            _take_turn(lock)
            config.attributes["url"] = url
            if not _newer(lock, config):
                command.upgrade(config, "head")
            lock.execute(select(func.pg_advisory_unlock(MIGRATION_LOCK)))
            lock.commit()
    finally:
        engine.dispose()


def _take_turn(lock: Connection) -> None:
    """Wait for the host that migrates now, with no statement open: making an index concurrently waits for all."""
    while not lock.scalar(select(func.pg_try_advisory_lock(MIGRATION_LOCK))):
        lock.commit()
        time.sleep(TURN_SECONDS)
    lock.commit()


def _newer(connection: Connection, config: Config) -> bool:
    """Whether a later version has migrated: migrations only expand, so this one runs on that schema."""
    current = MigrationContext.configure(connection).get_current_revision()
    connection.commit()
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if current is None or current in known:
        return False
    log.warning("schema.newer", revision=current)
    return True
