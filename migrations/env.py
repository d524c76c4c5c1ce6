"""Alembic's door: the URL comes from Settings (or `-x url=…`), the target from shared.store.tables."""

from alembic import context
from sqlalchemy import create_engine, pool

from shared.settings import Settings
from shared.store.db import Base


def run() -> None:
    connection = context.config.attributes.get("connection")
    if connection is not None:
        _migrate(connection)
        return
    url = (
        context.config.attributes.get("url")
        or context.get_x_argument(as_dictionary=True).get("url")
        or Settings().database_url
    )
    # A migration that waits for a lock would queue every other statement behind it.
    engine = create_engine(url, poolclass=pool.NullPool, connect_args={"options": "-c lock_timeout=4s"})
    with engine.connect() as opened:
        _migrate(opened)


def _migrate(connection: object) -> None:
    context.configure(
        connection=connection, target_metadata=Base.metadata, compare_type=True, transaction_per_migration=True
    )
    with context.begin_transaction():
        context.run_migrations()


run()
