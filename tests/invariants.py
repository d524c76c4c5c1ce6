"""The oracle of fault tests: what must hold of the rows whenever nothing moves. Each query answers with what breaks it.

I8 (every accepted job has a row) needs the client's memory and is asked by whoever submitted.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import text
from sqlalchemy.orm import Session

from tests import moves

INVARIANTS: Final = {
    "I1 a finished job has finished, and no other": (
        "select id from jobs where (status in ('succeeded','failed','cancelled')) <> (finished_at is not null)"
    ),
    "I2 a running job holds the devices of its open attempt, with its fence": """
        select j.id from jobs j join attempts a on a.job_id = j.id and a.ended_at is null
        where j.status = 'running' and (
            a.fence <> j.fence or a.together is null and jsonb_array_length(a.device_ids) <>
            (select count(*) from devices d where d.leased_by = j.id and d.fence = j.fence))""",
    "I2 a device that jobs share is held by one of them, with its fence": """
        select j.id from jobs j join attempts a on a.job_id = j.id and a.ended_at is null and a.together is not null
        where j.status = 'running' and not exists (
            select 1 from devices d join attempts b on b.job_id = d.leased_by and b.fence = d.fence
            where b.ended_at is null and b.device_ids = a.device_ids and a.device_ids = jsonb_build_array(d.id))""",
    "I3 no device is leased by a job that does not run": (
        "select d.id from devices d join jobs j on j.id = d.leased_by where j.status <> 'running'"
    ),
    "I4 events are numbered without gaps": (
        "select job_id from events group by job_id having max(seq) <> count(*) or min(seq) <> 1"
    ),
    "I5 success has a manifest, an adapter and a result file": """
        select j.id from jobs j left join adapters a on a.job_id = j.id
        where j.status = 'succeeded' and (j.manifest is null or a.id is null or j.result_file is null)""",
    "I5 only success has an adapter": (
        "select a.id from adapters a join jobs j on j.id = a.job_id where j.status <> 'succeeded'"
    ),
    "I5 what is published was made under the fence that succeeded": """
        select j.id from jobs j left join attempts a on a.job_id = j.id and a.outcome = 'succeeded'
            and a.fence = j.fence and strpos(j.manifest->>'prefix', '/a' || lpad(a.fence::text, 6, '0') || '/') > 0
        where j.status = 'succeeded' and j.manifest is not null and a.number is null""",
    "I6 fences grow with attempts": """
        select a.job_id from attempts a join attempts b on b.job_id = a.job_id and b.number > a.number
        where b.fence <= a.fence""",
    "I6 no attempt is ahead of its job's fence": (
        "select a.job_id from attempts a join jobs j on j.id = a.job_id where a.fence > j.fence"
    ),
    "I7 at most one open attempt, and only of a running job": """
        select a.job_id from attempts a join jobs j on j.id = a.job_id
        where a.ended_at is null group by a.job_id, j.status having count(*) > 1 or j.status <> 'running'""",
    "I10 a job moves only as docs/lifecycle.md lists": moves.unlisted(),
    "I9 a running job has a lease": "select id from jobs where status = 'running' and lease_until is null",
}


def broken(session: Session) -> list[str]:
    """The invariants that do not hold now, each with the first id that breaks it."""
    found = {name: session.execute(text(query)).first() for name, query in INVARIANTS.items()}
    return [f"{name}: {row[0]}" for name, row in found.items() if row is not None]
