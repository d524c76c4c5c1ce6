"""each pair of a job's metadata as a row of its own, in the order of lists; expand only"""

import sqlalchemy as sa
from alembic import op

revision = "0045_job_labels"
down_revision = "0044_cotraining"
branch_labels = None
depends_on = None

# A hash of fixed width: a key and its value may have over 2,000 bytes, and a row of an index at most 2,704.
LABEL = """
create function metadata_label(key text, value text) returns uuid language sql immutable strict parallel safe as
$$ select md5(length(key)::text || ':' || key || value)::uuid $$
"""

# By the statement and not by the row: a job's metadata is set once, when the job is made, by every version.
KEEP = """
create function keep_job_labels() returns trigger language plpgsql as $$
begin
    insert into job_labels (project_id, label, job_id)
    select made.project_id, metadata_label(pair.key, pair.value), made.id
    from made cross join lateral jsonb_each_text(made.metadata) pair
    where jsonb_typeof(made.metadata) = 'object'
    on conflict do nothing;
    return null;
end $$
"""


def upgrade() -> None:
    op.create_table(
        "job_labels",
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("label", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("project_id", "label", "job_id", name=op.f("pk_job_labels")),
    )
    op.execute(LABEL)
    op.execute(KEEP)
    op.execute(
        "create trigger jobs_keep_labels after insert on jobs referencing new table as made"
        " for each statement execute function keep_job_labels()"
    )


def downgrade() -> None:
    op.execute("drop trigger jobs_keep_labels on jobs")
    op.execute("drop function keep_job_labels()")
    op.execute("drop function metadata_label(text, text)")
    op.drop_table("job_labels")
