"""what waits and could start on an idle device, for autoscalers: a view and a function; expand only"""

from alembic import op

revision = "0038_queue_depth"
down_revision = "0037_settled_for"
branch_labels = None
depends_on = None

# One row for each job that the plan would start now on idle devices that suit it (shared/plan/scheduling.py, `_aside`).
# 3600 is `Policy.entry_seconds`; tests/integration/test_queue_depth.py holds view and plan together.
VIEW = """
CREATE VIEW queue_depth AS
WITH month AS (SELECT date_trunc('month', now(), 'UTC') AS began),
held AS (
    SELECT jobs.project_id, jobs.key_id, sum(jobs.gpus * jobs.nodes) AS devices
    FROM jobs WHERE jobs.status = 'running' GROUP BY jobs.project_id, jobs.key_id
),
spent AS (
    SELECT jobs.project_id, sum(greatest(
        extract(epoch FROM coalesce(attempts.ended_at, now()) - greatest(attempts.started_at, month.began))
            * jsonb_array_length(attempts.device_ids),
        jobs.charged_seconds)) AS seconds
    FROM month, attempts JOIN jobs ON jobs.id = attempts.job_id
    WHERE attempts.ended_at > month.began OR attempts.ended_at IS NULL
    GROUP BY jobs.project_id
),
waiting AS (
    SELECT jobs.id, jobs.project_id, jobs.created_at, jobs.gpus, jobs.nodes, jobs.bytes_per_device,
        jobs.needs_gpu, jobs.needs_bfloat16, jobs.needs_capability,
        projects.max_running AS project_cap, api_keys.max_running AS key_cap, projects.budget_device_seconds AS budget,
        sum(jobs.gpus * jobs.nodes) OVER project
            + coalesce((SELECT sum(held.devices) FROM held WHERE held.project_id = jobs.project_id), 0)
            AS project_devices,
        sum(jobs.gpus * jobs.nodes) OVER key
            + coalesce((SELECT sum(held.devices) FROM held WHERE held.key_id = jobs.key_id), 0) AS key_devices,
        sum(jobs.gpus * jobs.nodes * least(
            coalesce((jobs.progress ->> 'seconds_left')::float8, jobs.expected_seconds, 3600),
            jobs.max_runtime_seconds)) OVER project
            + CASE WHEN projects.budget_device_seconds IS NOT NULL
                THEN coalesce((SELECT spent.seconds FROM spent WHERE spent.project_id = jobs.project_id), 0) END
            AS project_seconds
    FROM jobs
    JOIN projects ON projects.id = jobs.project_id
    LEFT JOIN api_keys ON api_keys.id = jobs.key_id
    WHERE jobs.status = 'queued' AND NOT jobs.held AND NOT projects.held
        AND (jobs.not_before IS NULL OR jobs.not_before <= now())
    WINDOW project AS (PARTITION BY jobs.project_id ORDER BY jobs.created_at, jobs.id),
        key AS (PARTITION BY jobs.key_id ORDER BY jobs.created_at, jobs.id)
)
SELECT id AS job_id, project_id, gpus, nodes, gpus * nodes AS devices,
    bytes_per_device AS bytes_needed,
    needs_gpu, needs_bfloat16, coalesce(needs_capability, 0) AS needs_capability, created_at
FROM waiting
WHERE (project_cap IS NULL OR project_devices <= project_cap)
    AND (key_cap IS NULL OR key_devices <= key_cap)
    AND (budget IS NULL OR project_seconds <= budget)
"""

# Whether a device of this kind suits the job (shared/plan/capacity.py, `Abilities.met_by`). Capability 0: not NVIDIA's.
FUNCTION = """
CREATE FUNCTION could_run(job queue_depth, kind text, bytes bigint, capability integer, bfloat16 boolean)
RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT NOT (job.needs_gpu AND kind = 'cpu')
        AND (bfloat16 OR NOT job.needs_bfloat16)
        AND (capability = 0 OR capability >= job.needs_capability)
        AND bytes >= job.bytes_needed
$$
"""


def upgrade() -> None:
    op.execute(VIEW)
    op.execute(FUNCTION)


def downgrade() -> None:
    op.execute("DROP FUNCTION could_run")
    op.execute("DROP VIEW queue_depth")
