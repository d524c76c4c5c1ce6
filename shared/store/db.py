"""Engine, sessions and the declarative base."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar, cast

import psycopg
from psycopg.abc import PQGen
from sqlalchemy import Engine, MetaData, create_engine, event, text
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.pool import ConnectionPoolEntry

from shared.store.json_text import written

T = TypeVar("T")

# Every constraint is named by rule, so that migrations can name it too.
NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)


# A statement is given up after 10 s by the server, after this by us: a hung server or a half-open line says nothing.
SILENCE_SECONDS: Final = 15.0
# A connection that has rested for longer is asked whether it lives before it is lent.
RESTED_SECONDS: Final = 5.0
_READS: Final = "tunepool_reads"  # an engine's option: what `make_engine` was told


_UNSAID: Final = (None,) * 5  # sizes, precision and whether it may be null, of DB-API's seven


class _PlainCursor(psycopg.Cursor[Any]):
    """Describes a column by its name and type alone: SQLAlchemy asks for no more, and for each column of each query."""

    @property
    def description(self) -> Any:
        result = self.pgresult
        if result is None or not result.nfields:
            return super().description
        names = [(result.fname(place) or b"").decode() for place in range(result.nfields)]
        return [(name, result.ftype(place), *_UNSAID) for place, name in enumerate(names)]


class _ImpatientConnection(psycopg.Connection[Any]):
    """Gives up a server that has gone silent; without this a thread would wait for it for ever."""

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        try:
            return super().wait(gen, interval, SILENCE_SECONDS if timeout is None else timeout)
        except psycopg.OperationalError:
            if timeout is None:
                self.pgconn.finish()  # its state is unknown, so nobody may use it again
            raise


def make_engine(url: str, *, pool_size: int = 20, max_overflow: int = 10, reads: bool = False) -> Engine:
    """An engine that finds dead connections before it lends them and gives up on a silent server.

    A statement runs 10 s at the most and waits 5 s for a lock, so that no request hangs on another's transaction.

    Args:
        reads: most of its work are single reads (`reading_scope`), for which its connections stand ready; to change
            one for each read costs more calls than the read. `session_scope` is a transaction either way.
    """
    engine = create_engine(
        url,
        pool_size=pool_size,
        max_overflow=max_overflow,
        pool_timeout=5,
        json_serializer=written,
        pool_use_lifo=True,  # few connections do most of the work, and these have their statements prepared
        pool_recycle=1800,
        execution_options={_READS: reads},
        connect_args={
            "autocommit": reads,
            "connect_timeout": 3,
            "tcp_user_timeout": 10_000,  # milliseconds, for what was sent and never acknowledged
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "options": "-c timezone=UTC -c statement_timeout=10s -c lock_timeout=5s"
            " -c idle_in_transaction_session_timeout=30s",
        },
    )
    event.listen(engine, "do_connect", _connect)
    if reads:
        event.listen(engine, "checkin", _make_ready)
    event.listen(engine, "checkin", _note_rest)
    event.listen(engine, "checkout", _refuse_dead)
    return engine


def _connect(
    _dialect: object, _record: object, words: Sequence[Any], options: dict[str, Any]
) -> psycopg.Connection[Any]:
    return _ImpatientConnection.connect(*words, cursor_factory=_PlainCursor, **options)


def _make_ready(connection: psycopg.Connection[Any] | None, _record: ConnectionPoolEntry) -> None:
    """For the next read. None and a closed one: it is dead, and is not lent again."""
    if connection is not None and not connection.autocommit and not connection.closed:
        connection.autocommit = True


def _note_rest(_connection: object, record: ConnectionPoolEntry) -> None:
    record.info["rests_since"] = time.monotonic()


def _refuse_dead(connection: psycopg.Connection[Any], record: ConnectionPoolEntry, _lent: object) -> None:
    """SQLAlchemy's pre-ping asks the server each time; a server that ends tells every connection's socket by itself."""
    since = record.info.get("rests_since")
    if since is None:  # just made
        return
    if _has_spoken(connection):
        raise InvalidatePoolError("the server has ended an idle connection")
    if time.monotonic() - since > RESTED_SECONDS:
        try:
            connection.execute("select 1")
            connection.rollback()
        except psycopg.Error as error:
            raise InvalidatePoolError("an idle connection is dead") from error


def _has_spoken(connection: psycopg.Connection[Any]) -> bool:
    """Whether an idle connection has something to read. Nobody asked anything, so the server has closed it."""
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLIN)
    return bool(poller.poll(0))


@contextmanager
def session_scope(engine: Engine) -> Iterator[Session]:
    """A short session: commits at the end, rolls back on any error. Verbs flush, edges commit."""
    with Session(engine, expire_on_commit=False) as session, session.begin():
        if engine.get_execution_options().get(_READS):
            lent = cast("psycopg.Connection[Any]", session.connection().connection.dbapi_connection)
            lent.autocommit = False
        yield session


def reading_scope(engine: Engine) -> Session:
    """A session on an engine for `reads`: each statement is one round trip, and sees all that is committed by then."""
    assert engine.get_execution_options().get(_READS), "its sessions would be transactions"
    return Session(engine, expire_on_commit=False)


def database_age_seconds(session: Session) -> float:
    """Seconds since Postgres started: a reaper stays quiet until every worker had time to beat again."""
    return float(session.scalar(text("select extract(epoch from now() - pg_postmaster_start_time())")) or 0.0)
