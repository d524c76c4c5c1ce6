"""The figures of an installation for whoever watches it, counted in one statement that gives up after two seconds.

Postgres is the one truth: every process of the API tells the same. A figure that only grows is a count of rows that
stay: no restart lets it fall. Jobs that have ended are counted without being read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import text
from sqlalchemy.orm import Session

# Upper bounds of the buckets; above the last one is the rest.
WAIT_BUCKETS: Final = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600)
ERROR_BUCKETS: Final = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0)


@dataclass(frozen=True, slots=True)
class CountedFigure:
    """One number: of what, and for which two labels (empty where there are fewer)."""

    name: str
    first: str
    second: str
    value: float


# Memory ran out: another attempt with fewer rows a pass, one that recomputes activations, or the job's end.
_STATEMENT: Final = text("""
select 'jobs', status, coalesce(spec->'adapter'->>'method', ''), count(*)::float8 from jobs
  where status in ('validating_files','queued','running','paused') group by 2, 3
union all select 'oldest', '', '', coalesce(extract(epoch from now() - min(queued_at)), 0) from jobs
  where status = 'queued'
union all select 'wait', width_bucket(seconds, cast(:waits as float8[]))::text, '', count(*) from
  (select extract(epoch from started_at - queued_at)::float8 seconds from jobs
   where started_at is not null and queued_at is not null) waits group by 2
union all select 'wait_sum', '', '', coalesce(sum(greatest(0, extract(epoch from started_at - queued_at))), 0) from jobs
  where started_at is not null and queued_at is not null
union all select 'attempts', outcome, '', count(*) from attempts where outcome is not null group by 2
union all select 'oom', case when together > 1 then 'together'
    when error->>'message' like '%layers recomputed; %' then 'checkpointing'
    when micro_batch_size > 1 then 'fewer_rows'
    when error->>'message' like '%packed tokens a pass; %' then 'fewer_tokens' else 'checkpointing' end, '', count(*)
  from attempts where outcome = 'out_of_memory' group by 2
union all select 'oom', 'gave_up', '', count(*) from attempts
  where outcome = 'failed' and error->>'code' in ('gpu_oom', 'host_oom', 'out_of_memory')
union all select 'together_now', '', '', count(*) from attempts where together > 1 and ended_at is null
union all select 'together', '', '', count(*) from attempts where together > 1
union all select 'steps', '', '', coalesce(sum(greatest(0, last_step - first_step)), 0) from attempts
union all select 'tokens', '', '', coalesce(sum(greatest(0, last_tokens - first_tokens)), 0) from attempts
union all select 'device_seconds', jobs.project_id, 'leased', sum(jsonb_array_length(attempts.device_ids)
    * case when attempts.ended_at is not null then coalesce(attempts.device_share, 1)
      when attempts.device_share is null then 1 else 0 end
    * extract(epoch from coalesce(attempts.ended_at, now()) - attempts.started_at))
  from attempts join jobs on jobs.id = attempts.job_id group by 2
union all select 'device_seconds', jobs.project_id, 'wasted', sum(jsonb_array_length(attempts.device_ids)
    * coalesce(attempts.device_share, 1) * extract(epoch from attempts.ended_at - attempts.started_at))
  from attempts join jobs on jobs.id = attempts.job_id
  where attempts.outcome in ('lost', 'crashed', 'out_of_memory') group by 2
union all select 'devices', case when workers.last_seen < now() - interval '60 seconds' then 'silent'
    when devices.quarantined then 'quarantined' when not devices.healthy then 'ailing'
    when devices.leased_by is not null then 'leased' when workers.draining then 'draining' else 'free' end, '', count(*)
  from devices join workers on workers.id = devices.worker_id group by 2
union all select 'memory', id, 'total', total_bytes from devices
union all select 'memory', id, 'free', free_bytes from devices
union all select 'reading', devices.id, key, value::float8
  from devices join workers on workers.id = devices.worker_id, jsonb_each_text(devices.readings)
  where devices.readings is not null and workers.last_seen >= now() - interval '60 seconds'
union all select 'deliveries', outcome, '', coalesce(sum(tries), 0) from webhooks, lateral (values
    ('delivered', delivered_count), ('failed', failed_count), ('given_up', given_up_count)) counts (outcome, tries)
  group by 2
union all select 'error', width_bucket(ratio, cast(:errors as float8[]))::text, '', count(*) from
  (select measured_bytes::float8 / predicted_bytes ratio from measurements where predicted_bytes > 0) errors group by 2
union all select 'error_sum', '', '', coalesce(sum(measured_bytes::float8 / predicted_bytes), 0) from measurements
  where predicted_bytes > 0
""")


def count(session: Session) -> list[CountedFigure]:
    """Every figure as of now. Raises SQLAlchemy's OperationalError when it takes too long."""
    session.execute(text("set local statement_timeout = '2s'"))
    rows = session.execute(_STATEMENT, {"waits": list(WAIT_BUCKETS), "errors": list(ERROR_BUCKETS)})
    return [CountedFigure(name, first, second, float(value)) for name, first, second, value in rows]


def buckets(figures: Sequence[CountedFigure], name: str, bounds: Sequence[float]) -> list[tuple[str, float]]:
    """(upper bound, how many up to it), as Prometheus counts a histogram. Pure."""
    counts = {int(figure.first): figure.value for figure in figures if figure.name == name}
    below, cumulated = 0.0, []
    for place, bound in enumerate((*bounds, float("inf"))):
        below += counts.get(place, 0.0)
        cumulated.append(("+Inf" if bound == float("inf") else str(float(bound)), below))
    return cumulated
