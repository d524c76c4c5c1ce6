"""The moves of jobs. A trigger that only test databases have notes each one; docs/lifecycle.md lists the right ones."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Final

from sqlalchemy import text
from sqlalchemy.orm import Session

PAGE: Final = Path(__file__).parents[1] / "docs" / "lifecycle.md"

# A schema of its own: comparisons of the product's tables with its migrations do not see it.
WATCH: Final = """
create schema oracle;
create table oracle.moves (job_id text, before text, after text);
create function oracle.note() returns trigger language plpgsql as $$
begin
    insert into oracle.moves values (new.id, old.status, new.status);
    return new;
end $$;
create trigger oracle_notes_moves after update of status on public.jobs
    for each row when (old.status is distinct from new.status) execute function oracle.note();
"""


@cache
def listed() -> frozenset[tuple[str, str]]:
    """Every (from, to) of the first table of docs/lifecycle.md."""
    table = PAGE.read_text(encoding="utf-8").split("\n\n")[2]
    cells = [line.split("|")[1:3] for line in table.splitlines()[2:]]
    return frozenset((before, after) for froms, tos in cells for before in _states(froms) for after in _states(tos))


def _states(cell: str) -> list[str]:
    return re.findall(r"`([a-z_]+)`", cell)


def of(session: Session, job_id: str) -> set[tuple[str, str]]:
    """Every (from, to) that the job has made."""
    rows = session.execute(text("select before, after from oracle.moves where job_id = :job"), {"job": job_id})
    return {(row.before, row.after) for row in rows}


def unlisted() -> str:
    """A query for moves that the page does not list."""
    values = ", ".join(f"('{before}', '{after}')" for before, after in sorted(listed()))
    move = "job_id || ' ' || before || ' -> ' || after"
    return f"select {move} from oracle.moves where (before, after) not in (values {values})"  # noqa: S608  # our own page
