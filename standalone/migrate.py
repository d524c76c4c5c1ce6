"""Bringing a database to this version's schema."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import func, select, text

import shared
from shared.db import make_engine

# Any fixed number: hosts that start together take turns.
MIGRATION_LOCK = 7_365_119


def migrate(url: str) -> None:
    """Run what is missing, under a lock. Safe to run at every start."""
    config = Config()
    # Beside our packages, wherever those are; a `%` in the path is Alembic's sign for interpolation.
    folder = Path(shared.__file__).parent.parent / "migrations"
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    engine = make_engine(url)
    try:
        with engine.connect() as lock:
            lock.execute(text("set statement_timeout = 0"))  # the host before us may migrate for long
            lock.execute(text("set lock_timeout = 0"))
            lock.execute(select(func.pg_advisory_lock(MIGRATION_LOCK)))
            lock.commit()
            config.attributes["url"] = url
            command.upgrade(config, "head")
            lock.execute(select(func.pg_advisory_unlock(MIGRATION_LOCK)))
            lock.commit()
    finally:
        engine.dispose()
