"""What a program reports is kept, whatever it holds: a statement that fails would fail with every worker after it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from sqlalchemy import JSON, inspect, select
from sqlalchemy.orm import Session

from shared.lease import journal
from shared.lease.journal import NewEvent
from shared.store import tables
from shared.store.db import Base
from shared.store.json_text import written
from shared.store.tables import EventRow, FileRow, JobRow
from tests.factories import make_caller, make_file, make_job

HOSTILE = {
    "a\0b": ["\0", "\ud800", "x\udfffy", {"deep\0": "\ud83d"}],
    "numbers": [math.nan, math.inf, -math.inf, 1.5],
    "kept": ["größe 👩\u200d🔬", "\\u0000 spelled out", "\n", True, None, 3],
}
TAKEN = {
    "a\ufffdb": ["\ufffd", "\ufffd", "x\ufffdy", {"deep\ufffd": "\ufffd"}],
    "numbers": [None, None, None, 1.5],
    "kept": ["größe 👩\u200d🔬", "\\u0000 spelled out", "\n", True, None, 3],
}


def test_a_report_with_what_postgres_cannot_hold_is_kept_without_it(session: Session) -> None:
    file = make_file(session, make_caller(session))
    file.report = HOSTILE
    session.flush()

    assert session.scalar(select(FileRow.report).where(FileRow.id == file.id)) == TAKEN


def test_an_event_with_what_postgres_cannot_hold_is_kept_without_it(session: Session) -> None:
    job = make_job(session, make_caller(session))
    journal.append(session, job.id, [NewEvent("last word \0 \ud800", data=HOSTILE)])

    event = session.scalars(select(EventRow).where(EventRow.job_id == job.id).order_by(EventRow.seq.desc())).first()

    assert event is not None
    assert (event.message, event.data) == ("last word \ufffd \ufffd", TAKEN)


@pytest.mark.parametrize("value", [None, {}, [], "x", 1, {"a": [1, "b"]}])
def test_an_ordinary_value_is_written_as_it_is(session: Session, value: Any) -> None:
    job = make_job(session, make_caller(session))
    job.progress = value
    session.flush()

    assert session.scalar(select(JobRow.progress).where(JobRow.id == job.id)) == value


def test_every_json_column_is_written_by_the_one_function(session: Session) -> None:
    columns = [column for mapper in Base.registry.mappers for column in inspect(mapper.class_).columns]
    found = [column for column in columns if isinstance(column.type, JSON)]

    assert len(found) > 20
    assert {column.type.none_as_null for column in found} == {True}  # our own type, by which all are declared
    assert tables.Json in {column.type for column in found}
    dialect = session.get_bind().dialect
    for column in found:
        process = column.type.bind_processor(dialect)
        assert process is not None
        assert str(process({"a": "\0"})) == written({"a": "\0"})
