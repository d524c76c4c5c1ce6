"""jobs that have not ended are found by an index: limits, file deletes and the pool's overview read the whole table"""

import sqlalchemy as sa
from alembic import op

revision = "0007_unfinished_jobs"
down_revision = "0006_members"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Concurrently, so that submissions go on while a long table is indexed.
    with op.get_context().autocommit_block():
        # What an interrupted attempt left is invalid, and stays so: no query uses it.
        op.drop_index("ix_jobs_unfinished", "jobs", postgresql_concurrently=True, if_exists=True)
        op.create_index(
            "ix_jobs_unfinished",
            "jobs",
            ["project_id", "id"],
            postgresql_where=sa.text("status in ('validating_files','queued','running','paused')"),
            postgresql_concurrently=True,
        )


def downgrade() -> None:
    with op.get_context().autocommit_block():
        op.drop_index("ix_jobs_unfinished", "jobs", postgresql_concurrently=True, if_exists=True)
