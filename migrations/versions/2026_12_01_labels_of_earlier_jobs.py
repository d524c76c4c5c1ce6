"""labels of the jobs that were there before the trigger; expand only"""

import sqlalchemy as sa
from alembic import op

revision = "0046_earlier_labels"
down_revision = "0045_job_labels"
branch_labels = None
depends_on = None

# One part of the jobs, in the order of their ids: the last id of the part, or nothing at the end.
PART = sa.text("""
with part as materialized (select id, project_id, metadata from jobs where id > :after order by id limit 20000),
labelled as (
    insert into job_labels (project_id, label, job_id)
    select part.project_id, metadata_label(pair.key, pair.value), part.id
    from part cross join lateral jsonb_each_text(part.metadata) pair
    where jsonb_typeof(part.metadata) = 'object'
    on conflict do nothing
)
select max(id) from part
""")


def upgrade() -> None:
    # In parts, each committed alone: no lock is held for long, and what was interrupted is done once more.
    with op.get_context().autocommit_block():
        after: str | None = ""
        while after is not None:
            after = op.get_bind().execute(PART, {"after": after}).scalar_one()


def downgrade() -> None:
    pass
