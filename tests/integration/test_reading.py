"""An engine for reads: a read alone is no transaction, and a session that writes is one, on the same connection."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, func, select, text

from shared.ids import new_id
from shared.store.db import make_engine, reading_scope, session_scope
from shared.store.tables import OrganizationRow


@pytest.fixture
def reads(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url, pool_size=1, max_overflow=0, reads=True)
    yield engine
    engine.dispose()


def named(engine: Engine, name: str) -> int:
    with reading_scope(engine) as session:
        return session.scalar(select(func.count()).where(OrganizationRow.name == name)) or 0


def test_what_a_session_has_written_is_there_when_it_ends_and_not_before(reads: Engine, engine: Engine) -> None:
    name = new_id("org_")
    with session_scope(reads) as session:
        session.add(OrganizationRow(id=name, name=name))
        session.flush()
        with session_scope(engine) as other:
            assert other.get(OrganizationRow, name) is None

    assert named(reads, name) == 1


def test_a_session_that_fails_leaves_nothing_behind(reads: Engine) -> None:
    name = new_id("org_")

    def write_and_fail() -> None:
        with session_scope(reads) as session:
            session.execute(text("insert into organizations (id, name) values (:name, :name)"), {"name": name})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()

    assert named(reads, name) == 0


def test_a_read_leaves_no_transaction_open_also_after_one_that_wrote(reads: Engine) -> None:
    with session_scope(reads) as session:
        session.execute(text("select 1"))
    with reading_scope(reads) as session:
        begun = [session.scalar(text("select now()")) for _ in range(2)]

    assert begun[0] != begun[1], "two statements of one transaction have one moment"


def test_an_engine_that_is_not_for_reads_is_not_taken_for_one(engine: Engine) -> None:
    with pytest.raises(AssertionError, match="transactions"):
        reading_scope(engine)
